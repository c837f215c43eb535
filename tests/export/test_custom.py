"""A student of one's own code, opened in a process that has no distill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.export.custom import self_contained
from distill.export.hf import HuggingFaceFormat
from distill.export.probe import our_logits
from distill.plugins import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Tied under an unusual name, a buffer that is saved and one that is not, a bias, a head with both transformations.
OWN = '''\
"""A student of the test's own."""

import torch
from torch import nn

from distill.models.language_model import (
    Head,
)


class Own(nn.Module):
    def __init__(self, vocab_size: int, size: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.layer = nn.Linear(size, size)
        self.output = nn.Linear(size, vocab_size)
        self.shared_table = self.output.weight = self.embedding.weight
        self.register_buffer("decay", torch.linspace(0.1, 0.9, size), persistent=False)
        self.register_buffer("gain", torch.full((1,), 1.5))
        assert float(self.decay[0]) > 0, "a constructor may look at what it made"

    def body(self, ids, positions):
        hidden = self.embedding(ids) + torch.sin(positions[..., None] * self.decay).to(self.decay.dtype)
        return torch.cumsum(torch.tanh(self.layer(hidden)) * self.decay, 1) * self.gain / (positions[..., None] + 1)

    @property
    def head(self):
        return Head(self.output.weight, self.output.bias, scale=2.0, soft_cap=5.0)
'''

OPEN = """
import json, os, sys, tempfile
for name in ("distill", "teachers", "students"):
    sys.modules[name] = None
folder, ids, padding, elsewhere = json.loads(sys.stdin.read())
with tempfile.TemporaryDirectory() as modules:
    os.environ.update(HF_MODULES_CACHE=modules, HF_HUB_OFFLINE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # which needs no code
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids_BL = torch.tensor([ids])
    with torch.no_grad():
        answer = model(input_ids=ids_BL, labels=ids_BL)
    padded_BL = torch.tensor([[padding] * 3 + ids, ids + [padding] * 3])
    alone_BL = model.generate(ids_BL, max_new_tokens=7, do_sample=False, eos_token_id=None)
    left = model.generate(padded_BL[:1], attention_mask=(padded_BL != padding)[:1].long(), max_new_tokens=7,
                          do_sample=False, eos_token_id=None)
    right = model(input_ids=padded_BL[1:]).logits[0, : len(ids)]
    model.save_pretrained(elsewhere)
    again = AutoModelForCausalLM.from_pretrained(elsewhere, trust_remote_code=True)(input_ids=ids_BL).logits
print(json.dumps({
    "logits": answer.logits[0].tolist(), "loss": float(answer.loss), "alone": alone_BL[0].tolist(),
    "left": left[0, 3:].tolist(), "right": right.tolist(), "again": again[0].tolist(),
    "tied": model.student.output.weight is model.student.embedding.weight,
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False),
}))
"""


@pytest.fixture
def own(custom_student: Any, tmp_path: Path) -> Path:
    (tmp_path / "my-student.py").write_text(OWN)
    return custom_student(tmp_path / "own", f"{tmp_path}/my-student.py:Own", size=12)


def test_without_leave_no_code_is_put_into_a_folder(compact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compact is code of its own .* --with_code .* trust_remote_code=True"):
        HuggingFaceFormat().write(compact, tmp_path / "out")


def test_with_its_code_it_is_an_ordinary_model(compact: Path, tokens_of: Any, greedy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    HuggingFaceFormat(with_code=True).write(compact, folder)
    assert not (folder / "student.json").exists() and not (folder / "settings.json").exists()
    ids, padding = tokens_of(compact), 3
    request = json.dumps([str(folder), ids, padding, str(tmp_path / "again")])
    done = subprocess.run([sys.executable, "-I", "-c", OPEN], input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    ours = load_language_model(compact)
    logits_NV = our_logits(ours, [ids])[0]
    for name in ("logits", "right", "again"):
        torch.testing.assert_close(torch.tensor(found[name]), logits_NV, rtol=0, atol=1e-4)
    expected = torch.nn.functional.cross_entropy(logits_NV[:-1], torch.tensor(ids[1:]))
    assert found["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert found["alone"] == found["left"] == greedy(ours, ids, 7)
    assert found["tied"] and found["chat"].startswith("<|im_start|>user")


def test_what_a_constructor_computed_is_there_again(own: Path, read: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    form = HuggingFaceFormat("bfloat16", with_code=True, class_path=f"{tmp_path}/my-student.py:Own")
    form.write(own, folder)
    said, needed = form.check(own, folder), (folder / "requirements.txt").read_text().splitlines()[1:]
    assert "largest difference" in said and all(line in said for line in needed)
    assert [line.partition("==")[0] for line in needed] == ["torch", "transformers"] and "+" not in "".join(needed)
    configuration = read(folder / "config.json")
    assert configuration["student_options"]["size"] == 12 and configuration["tie_word_embeddings"]
    assert configuration["isolates_documents"] is False
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert set(code) == {"modeling_student.py", "language_model.py", "documents_apart.py", "student.py"}
    assert all("licence" in text or "SPDX" in text.splitlines()[0] for text in code.values())
    assert "from .student import Own as Student\n" in code["modeling_student.py"]
    assert not any(str(tmp_path) in path.read_text() for path in folder.iterdir() if path.suffix in (".py", ".json"))


def test_what_it_may_import(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").touch()
    file = tmp_path / "student.py"
    for line in (
        "from distill.models.huggingface import quiet",
        "import distill.models.language_model",
        "from distill.models import language_model",
        "from students.compact import Block",
        "from .helpers import x",
        "from . import helpers",
        "def f():\n    import helpers",
    ):
        with pytest.raises(UserError, match="must be self-contained"):
            self_contained(f"import torch\n{line}\n", file)
    kept = 'TEXT = """\nfrom distill.models.language_model import Head\n"""\n'
    source = f"{kept}import torch, math\nif True:\n    from  distill.models.language_model  import Head as H\n"
    expected = f"{kept}import torch, math\nif True:\n    from .language_model import Head as H\n"
    assert self_contained(source, file) == expected
