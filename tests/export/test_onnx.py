"""An exported ONNX graph answers as the student does, at any batch and length; what cannot be one is told."""

from __future__ import annotations

import builtins
import importlib
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from distill.errors import UserError
from distill.export import onnx as format_onnx
from distill.export import onnx_tracing
from distill.export.onnx import OnnxFormat
from distill.export.probe import our_logits
from distill.plugins import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")


def answers(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    ids_BL = torch.tensor(rows).numpy()
    return torch.from_numpy(session.run(["logits"], {"input_ids": ids_BL})[0])


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("gpt2", {"n_layer": 1}),
        ("qwen3", {"num_hidden_layers": 1}),
        ("gemma3_text", {"num_hidden_layers": 1, "sliding_window": 5}),
    ],
)
def test_logits_equal_ours_at_sizes_that_were_not_traced(
    family: str,
    sizes: dict[str, Any],
    hugging_face_student: Any,
    tokens_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, folder = hugging_face_student(tmp_path / "student", family, **sizes), tmp_path / "out"
    folder.mkdir()
    split = family == "gpt2"  # as weights that are too large for one file
    if split:
        monkeypatch.setattr(format_onnx, "ONE_FILE", 10_000)
    OnnxFormat().write(source, folder)
    assert (folder / "model.onnx.data").exists() is split
    folder = folder.rename(tmp_path / "moved")
    assert "largest difference of a logit" in OnnxFormat().check(source, folder)
    model, ids = load_language_model(source), tokens_of(source)
    for length in (1, 2, 9, 23):
        rows = [ids[:length], ids[::-1][:length], ids[1 : length + 1]]
        torch.testing.assert_close(answers(folder, rows), torch.stack(our_logits(model, rows)), rtol=0, atol=1e-3)
    padded = answers(folder, [ids[:9], ids[:4] + [0] * 5])
    torch.testing.assert_close(padded[1, :4], our_logits(model, [ids[:4]])[0], rtol=0, atol=1e-3)
    assert (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file()
    content = (folder / "model.onnx").read_bytes()
    assert not [word for word in (b".py", b"stack_trace", torch.__path__[0].encode()) if word in content]


def test_a_student_of_ones_own_and_another_one(compact: Path, custom_student: Any, tmp_path: Path) -> None:
    """The worked example asks its positions whether a document begins, which no trace can answer."""
    folder = tmp_path / "out"
    folder.mkdir()
    OnnxFormat().write(compact, folder)
    OnnxFormat().check(compact, folder)
    other = custom_student(tmp_path / "other", "compact", hidden_size=32, layers=2, heads=4, norm_eps=0.3)
    with pytest.raises(UserError, match=r"answers otherwise: .*largest difference of a logit \d"):
        OnnxFormat().check(other, folder)


BRANCHES = """\
import torch
from torch import nn
from distill.models.language_model import Head


class Branching(nn.Module):
    def __init__(self, vocab_size: int, on: str) -> None:
        super().__init__()
        self.embedding, self.on = nn.Embedding(vocab_size, 8), on

    def body(self, ids, positions):
        hidden = self.embedding(ids)
        if self.on == "tokens" and (ids + 1 == 5).any():
            return hidden * 2
        if self.on == "hidden" and hidden.sum() > 0:
            return hidden * 2
        if self.on == "length" and positions.max() > 10:
            return hidden * 2
        if self.on == "list" and sum(positions[0].tolist()) > 10:
            return hidden * 2
        if self.on == "numpy":
            return hidden + torch.from_numpy(positions.numpy())[..., None]
        return hidden

    @property
    def head(self):
        return Head(self.embedding.weight)
"""


@pytest.mark.parametrize(
    ("on", "why"),
    [
        ("tokens", r"branching\.py, line 13 .* depends on the tokens"),
        ("hidden", r"branching\.py, line 15 .* depends on the tokens"),
        ("length", r"branching\.py, line 17 .* depends on how many tokens"),
        ("list", "another path while it is traced"),
        ("numpy", "torch.export cannot trace this model for ONNX: "),
    ],
)
def test_a_path_that_depends_on_the_text_is_told(on: str, why: str, custom_student: Any, tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(BRANCHES)
    source = custom_student(tmp_path / "student", f"{tmp_path}/branching.py:Branching", on=on)
    with pytest.raises(UserError, match=why):
        OnnxFormat(f"{tmp_path}/branching.py:Branching").write(source, tmp_path)


def test_questions_that_no_token_decides_are_answered() -> None:
    weight = torch.nn.Parameter(torch.ones(40, 2))

    def forward(ids_BL: torch.Tensor) -> torch.Tensor:
        positions_BL = torch.arange(ids_BL.shape[1]).expand(ids_BL.shape)
        hidden = torch.nn.functional.embedding(ids_BL, weight)
        if bool((positions_BL.diff() != 1).any()) or weight.sum().item() != 80:
            return hidden
        return hidden + positions_BL[..., None]

    assert onnx_tracing.answers(forward, [(1, 1), (2, 5)], 40) == (False, 80.0)
    with onnx_tracing.Repeat([True]):
        assert torch.equal(forward(torch.zeros(1, 2, dtype=torch.long)), torch.ones(1, 2, 2))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UserError, match=r"needs onnxscript.*pip install onnx onnxscript onnxruntime"):
        OnnxFormat()
