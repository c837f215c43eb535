"""A saved language model is complete or absent, and comes back the same."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import plugins
from distill.errors import UserError
from distill.models.chat_templates import untagged
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.saving import save_language_model
from distill.plugins import load_language_model
from distill.system.staging import recover

OPTIONS = {"vocab_size": 300, "hidden_size": 32, "layers": 2, "heads": 4}


def hidden(model: Any) -> torch.Tensor:
    ids_BL = torch.arange(6)[None]
    with torch.no_grad():
        return model.head(model.body(ids_BL, ids_BL))


@pytest.mark.parametrize("tie", [True, False])
def test_a_custom_student_comes_back_bit_for_bit(tie: bool, tmp_path: Path, tokenizer: Any) -> None:
    options = {**OPTIONS, "tie_embeddings": tie}
    model = plugins.build("compact", "student", options, {})
    save_language_model(model, tmp_path / "student", "compact", options, tokenizer)
    again = load_language_model(tmp_path / "student")
    assert torch.equal(hidden(again), hidden(model))
    assert (again.output.weight is again.embedding.weight) is tie
    assert not again.training


def test_a_saved_chat_template_has_no_tags_and_the_tokenizer_keeps_its_own(tmp_path: Path, tokenizer: Any) -> None:
    tagged = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tagged
    save_language_model(plugins.build("compact", "student", OPTIONS, {}), tmp_path / "s", "compact", OPTIONS, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "s").chat_template == untagged(tagged) != tagged
    assert tokenizer.chat_template == tagged


def test_a_hugging_face_student_is_an_ordinary_folder(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("qwen3"))
    save_language_model(model, tmp_path / "student", "huggingface", {}, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(plain(input_ids=torch.arange(6)[None]).logits, hidden(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "student").encode("the cat") == tokenizer.encode("the cat")
    assert torch.equal(hidden(load_language_model(tmp_path / "student")), hidden(model))


def test_a_folder_alone_stops_where_the_tokenizer_ends(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    model = tiny_model("llama")
    ids = torch.arange(6)[None]
    written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    end = next(token for token in written if token > 1)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    save_language_model(HuggingFaceLanguageModel(model), tmp_path / "student", "huggingface", {}, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert plain.config.eos_token_id == plain.generation_config.eos_token_id == end
    alone = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    assert alone == written[: written.index(end) + 1]


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "student", "compact", OPTIONS, tokenizer)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    class FullDisk:
        def save_pretrained(self, _: Path) -> None:
            raise OSError("no space left on device")

    changed = plugins.build("compact", "student", OPTIONS, {})
    with pytest.raises(OSError, match="no space"):
        save_language_model(changed, folder, "compact", OPTIONS, FullDisk())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "nothing half-made is left"
    save_language_model(changed, folder, "compact", OPTIONS, tokenizer)
    assert torch.equal(hidden(load_language_model(folder)), hidden(changed))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda whole: whole[:-1], "cut off or damaged"),
        (lambda whole: b"", "is empty"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (lambda whole: b"<!DOCTYPE html>", "an HTML page"),
    ],
)
def test_weights_of_a_custom_student_that_are_none_are_called_what_they_are(
    content: Any, why: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    path = save_language_model(model, tmp_path / "student", "compact", OPTIONS, tokenizer) / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=rf"model\.safetensors .*{why}"):
        load_language_model(tmp_path / "student")


def test_what_does_not_fit_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "student", "compact", {**OPTIONS, "layers": 3}, tokenizer)
    with pytest.raises(UserError, match="do not fit compact"):
        load_language_model(folder)
    with pytest.raises(UserError, match="holds no language model"):
        load_language_model(tmp_path)


@pytest.fixture
def asking(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`asking(class_path, **options)`: a run folder `run`, we are in it, whose `student` asks for that class.

    Code that would leave a file `touched` lies in the student's folder, beside it, and behind a link.
    """
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, run / "student", "compact", OPTIONS, tokenizer)
    elsewhere.mkdir()
    for place in (run, folder, elsewhere):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Model: ...")
    (run / "linked").symlink_to(elsewhere)
    (run / "model").symlink_to(folder)
    monkeypatch.chdir(run)

    def ask(class_path: str, **options: Any) -> Path:
        (folder / "student.json").write_text(json.dumps({"class_path": class_path, "options": options}))
        return folder

    return ask


@pytest.mark.parametrize(
    "class_path",
    [
        *("student/evil.py:Model", "evil.py:Model", "linked/evil.py:Model", "../elsewhere/evil.py:Model"),
        *("student.evil:Model", "evil:Model", "student.evil.deeper:Model", "run.evil:Model"),
        *("subprocess:Popen", "torch.nn:Linear", "nonsense", "students.compact:load_state_dict"),
    ],
)
def test_only_code_that_the_user_named_is_run(class_path: str, asking: Any, tmp_path: Path) -> None:
    """A model's folder may come from anyone: its student.json is data, wherever the code lies that it asks for."""
    folder = asking(class_path)
    for named in (None, "compact", "mine.py:Model"):
        for path in (folder, Path("student"), folder.parent / "model"):
            with pytest.raises(UserError, match=re.escape(class_path)):
                load_language_model(path, class_path=named)
    assert not (tmp_path / "touched").exists()


def test_code_is_the_users_and_not_the_folders_of_that_name(asking: Any, tmp_path: Path) -> None:
    source = "from students.compact import CompactDecoder as Mine"
    (tmp_path / "mine.py").write_text(source)
    folder = asking("/somewhere/mine.py:Mine", **OPTIONS)
    (folder / "mine.py").write_text((folder / "evil.py").read_text())
    model = load_language_model(folder, class_path=f"{tmp_path}/mine.py:Mine")
    assert type(model).__name__ == "CompactDecoder" and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["huggingface", "lora", "pruned"])
def test_a_built_in_that_opens_other_checkpoints_is_not_a_folders_to_call(name: str, asking: Any) -> None:
    for options in ({"model": "../elsewhere"}, {"teacher": "org/name", "trust_remote_code": True}):
        with pytest.raises(UserError, match=r"opens other checkpoints|trust"):
            load_language_model(asking(name, **options), class_path=name)


@pytest.mark.parametrize("trust", [True, False, "yes"])
def test_options_of_a_folder_never_say_whom_to_trust(trust: Any, asking: Any) -> None:
    with pytest.raises(UserError, match="cannot ask for trust"):
        load_language_model(asking("compact", **OPTIONS, trust_remote_code=trust))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"class_path": 3, "options": {}}', b"[" * 9**6, b"\xff"])
def test_a_description_that_is_none_is_refused(content: bytes, asking: Any) -> None:
    folder = asking("compact", **OPTIONS)
    (folder / "student.json").write_bytes(content)
    with pytest.raises(UserError, match=r"student\.json"):
        load_language_model(folder)
    (folder / "student.json").unlink()
    os.mkfifo(folder / "student.json")
    with pytest.raises(UserError, match=r"student\.json"):
        load_language_model(folder)


def test_a_description_tells_nothing_of_the_machine(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a path that it leaves out can be given again on loading; or the file lies in the current folder."""
    (tmp_path / "mine.py").write_text(
        "from students.compact import CompactDecoder\n"
        "def make(seen, **options):\n    open(seen[0]['file']).close()\n    return CompactDecoder(**options)"
    )
    named, seen = f"{tmp_path}/mine.py:make", [{"file": str(tmp_path / "mine.py")}]
    model = plugins.build(named, "student", {**OPTIONS, "seen": seen}, {})
    folder = save_language_model(model, tmp_path / "student", named, {**OPTIONS, "seen": seen}, tokenizer)
    assert str(tmp_path) not in (folder / "student.json").read_text()
    with pytest.raises(UserError, match=r"No such file.*run this in the folder where that file lies"):
        load_language_model(folder, class_path=named)
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert torch.equal(hidden(load_language_model(folder, class_path=named)), hidden(model))
    assert torch.equal(
        hidden(load_language_model(folder, class_path=named, options={"seen": seen, "other": 1})), hidden(model)
    )


def test_further_files_are_part_of_what_is_complete_or_absent(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    there: list[bool] = []

    def write_more(new: Path) -> None:
        there.extend([(tmp_path / "student").exists(), (new / "model.safetensors").exists()])
        (new / "settings.json").write_text("{}")

    save_language_model(model, tmp_path / "student", "compact", OPTIONS, tokenizer, write_more)
    assert there == [False, True] and (tmp_path / "student/settings.json").read_text() == "{}"

    def fail(_: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_language_model(model, tmp_path / "other", "compact", OPTIONS, tokenizer, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_what_the_pipeline_supplied_for_making_a_student_is_not_kept(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "s", "compact", {**OPTIONS, "first_samples": list}, tokenizer)
    assert json.loads((folder / "student.json").read_text())["options"] == OPTIONS
    with pytest.raises(UserError, match="cannot be written as JSON"):
        save_language_model(model, tmp_path / "t", "compact", {**OPTIONS, "other": list}, tokenizer)


def test_a_model_that_can_be_merged_is_saved_merged(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    class Adapted(torch.nn.Module):
        def merged(self) -> HuggingFaceLanguageModel:
            return HuggingFaceLanguageModel(tiny_model("llama"))

    folder = save_language_model(Adapted(), tmp_path / "student", "x.py:Adapted", {}, tokenizer)
    assert torch.equal(hidden(load_language_model(folder)), hidden(HuggingFaceLanguageModel(tiny_model("llama"))))


KILLED = """
import os, sys
from pathlib import Path
from distill import plugins
from distill.models import saving

OPTIONS = {options}
step, folder = sys.argv[1], Path(sys.argv[2])

class Tokenizer:
    def save_pretrained(self, new):
        (Path(new) / "half").mkdir()
        (Path(new) / "half/written").touch()
        if step == "write":
            os._exit(9)
        if step == "wait":
            print("writing", flush=True)
            sys.stdin.read()

real = Path.rename
def rename(path, target):
    real(path, target)
    if step == "rename":  # the old model has its new name, the new one not yet
        os._exit(9)
Path.rename = rename
model = plugins.build("compact", "student", OPTIONS, {{}})
saving.save_language_model(model, folder, "compact", OPTIONS, Tokenizer())
"""


def killed(step: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED.format(options=OPTIONS), step, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_kill_loses_no_model_and_its_remains_go_with_the_next_save(step: str, tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "student", "compact", OPTIONS, tokenizer)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with killed(step, folder) as process:
        assert process.wait(120) == 9
    assert folder.exists() is (step == "write") and len(list(tmp_path.iterdir())) == 2
    recover(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert torch.equal(hidden(load_language_model(folder)), hidden(model))
    changed = plugins.build("compact", "student", OPTIONS, {})
    save_language_model(changed, folder, "compact", OPTIONS, tokenizer)
    assert torch.equal(hidden(load_language_model(folder)), hidden(changed))
    assert [path.name for path in tmp_path.iterdir()] == ["student"] and not (folder / "half").exists()


def test_loading_brings_the_old_model_back_too(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "student", "compact", OPTIONS, tokenizer)
    folder.rename(tmp_path / ".student.old")
    assert torch.equal(hidden(load_language_model(folder)), hidden(model))
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    recover(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.skipif(os.name == "nt", reason="no file locks there")
def test_a_save_in_progress_is_left_alone(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = tmp_path / "student"
    with killed("wait", folder) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match="another process is writing here"):
            save_language_model(model, folder, "compact", OPTIONS, tokenizer)
        process.stdin.close()
        assert process.wait(120) == 0
    assert (folder / "half/written").exists()
    save_language_model(model, folder, "compact", OPTIONS, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
