"""A model's folder, which may come from anyone, reads nothing elsewhere, unpickles nothing and asks for no code."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.models import safety
from distill.models.checkpoints import load_config, resolve, weight_files
from distill.models.huggingface import load_pretrained
from distill.models.tokenizers import load_folder_tokenizer, load_tokenizer
from distill.plugins import load_language_model

OPENED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def every_way_fails(folder: Path, why: str) -> None:
    """Assert that a folder is refused, whichever way it is opened."""
    ways: list[Callable[[], Any]] = [
        lambda: load_tokenizer(resolve(str(folder))),
        lambda: load_folder_tokenizer(folder),
        lambda: load_config(resolve(str(folder))),
        lambda: weight_files(resolve(str(folder))),
        lambda: load_pretrained(resolve(str(folder)), torch.float32),
        lambda: load_language_model(folder),
    ]
    for way in ways:
        with pytest.raises(UserError, match=why):
            way()


def write(folder: Path, name: str, **content: Any) -> None:
    """Add to a JSON file of the folder."""
    path = folder / name
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**there, **content}))


@pytest.mark.parametrize("name", OPENED)
def test_no_link_is_followed_out_of_the_folder(name: str, llama_folder: Path, tmp_path: Path) -> None:
    shutil.move(llama_folder / name, tmp_path / name)
    (llama_folder / name).symlink_to(tmp_path / name)
    every_way_fails(llama_folder, rf"{name} is a link out of this folder")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", [*OPENED[1:], "chat_template.jinja", "additional_chat_templates/tool.jinja"])
def test_what_is_no_plain_file_is_refused_and_does_not_hang(make: Any, name: str, llama_folder: Path) -> None:
    path = llama_folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    every_way_fails(llama_folder, f"{path.name} is (no plain file|a link out of)")


def test_a_folder_of_templates_elsewhere_is_not_read(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (llama_folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    every_way_fails(llama_folder, "additional_chat_templates")


def test_links_inside_and_those_of_a_hub_download_are_followed(llama_folder: Path, tmp_path: Path) -> None:
    expected = load_language_model(llama_folder).head.weight_VD
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(llama_folder.iterdir()):
        shutil.move(path, blobs / f"{path.name}-sha")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-sha")
    (tmp_path / "mine").symlink_to(snapshot)  # the folder itself may be called anything
    (snapshot / "vocab.txt").symlink_to("config.json")
    assert torch.equal(load_language_model(tmp_path / "mine").head.weight_VD, expected)
    (snapshot / "vocab.json").symlink_to("../../secret")
    (tmp_path / "models--a--b/secret").touch()
    every_way_fails(tmp_path / "mine", r"vocab\.json is a link out")


@pytest.mark.parametrize(
    "file",
    ["../other.safetensors", "/etc/passwd.safetensors", "pytorch_model.bin", "sub/x.safetensors", "..", "", 3, None],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_an_index_names_safetensors_of_its_own_folder(file: Any, index: str, llama_folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(llama_folder, max_shard_size="20KB")
    (llama_folder / "model.safetensors").unlink()
    assert len(weight_files(resolve(str(llama_folder)))) > 1
    there = json.loads((llama_folder / "model.safetensors.index.json").read_text())["weight_map"]
    write(llama_folder, index, weight_map={**there, "lm_head.weight": file})
    every_way_fails(llama_folder, "no safetensors file of this folder")
    (llama_folder / index).write_text("[]")
    every_way_fails(llama_folder, "holds no object")


def test_weights_of_another_name_and_pickled_adapters_are_refused(llama_folder: Path) -> None:
    (llama_folder / "adapter_config.json").write_text("{}")
    (llama_folder / "adapter_model.bin").touch()
    every_way_fails(llama_folder, "pickled weights are refused")
    (llama_folder / "adapter_config.json").unlink()
    write(llama_folder, "config.json", transformers_weights="../other.safetensors")
    every_way_fails(llama_folder, "names other weights")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_of_the_hub_is_not_run(key: str, llama_folder: Path) -> None:
    """A kernel is compiled code; with the package `kernels` installed, transformers would fetch it."""
    write(llama_folder, "config.json", text_config={key: "somebody/kernel"})
    every_way_fails(llama_folder, "asks for code of the hub")


def test_code_of_the_folder_is_not_run(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    write(llama_folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="T")
    write(llama_folder, "config.json", auto_map=auto_map, model_type="evil")
    for way in (load_config, load_tokenizer, lambda folder: load_pretrained(folder, torch.float32)):
        with pytest.raises(UserError, match=r"custom code|tokenizer cannot be read"):
            way(resolve(str(llama_folder)))
    assert not (tmp_path / "touched").exists()


def test_damaged_configurations_are_refused(llama_folder: Path) -> None:
    for content in ("", "[1]", "[" * 10**6, "null", "\0"):
        (llama_folder / "config.json").write_text(content)
        every_way_fails(llama_folder, r"config\.json")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda whole: whole[: len(whole) // 2], "cut off or damaged"),
        (lambda whole: whole[:20], "cut off or damaged"),
        (lambda whole: os.urandom(999), "cut off or damaged"),
        (lambda whole: b"", "is empty: fetch it anew"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git-lfs pointer.*git lfs pull"),
        (lambda whole: b"\n<!DOCTYPE html>\n<html>401</html>", "an HTML page"),
    ],
)
@pytest.mark.parametrize("is_split", [False, True])
def test_weights_that_are_none_are_called_what_they_are(
    content: Callable[[bytes], bytes], why: str, is_split: bool, llama_folder: Path
) -> None:
    path = llama_folder / "model.safetensors"
    if is_split:
        path = path.rename(llama_folder / "model-00001-of-00001.safetensors")
        write(llama_folder, "model.safetensors.index.json", weight_map={"lm_head.weight": path.name})
    path.write_bytes(content(path.read_bytes()))
    for way in (weight_files, lambda checkpoint: load_pretrained(checkpoint, torch.float32)):
        with pytest.raises(UserError, match=f"{path.name} .*{why}"):
            way(resolve(str(llama_folder)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (lambda whole: b"<html>", "is an HTML page"),
        (lambda whole: b"GGML", "is no GGUF file"),
        (lambda whole: whole[:10], "is cut off or damaged"),
        (lambda whole: whole[:-1], "is cut off or damaged"),
    ],
)
def test_a_gguf_file_that_is_none_is_refused(content: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((8, 8), dtype=np.float32))
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_part()
    writer.close()
    path.write_bytes(content(path.read_bytes()))
    for way in (load_config, load_tokenizer):
        with pytest.raises(UserError, match=rf"model\.gguf {why}.*(fetch it anew|git lfs pull)"):
            way(resolve(str(path)))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"<!doctype html>", "is an HTML page"),
        (b'{"eos_token_id": [1, 2', "cannot be read"),
        (b"null", "holds no object"),
        (b"[1, 2]", "holds no object"),
        (b'{"a":' * 10**4 + b"1" + b"}" * 10**4, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_of_settings_is_named(file: str, content: bytes, why: str, llama_folder: Path) -> None:
    """transformers leaves a damaged generation_config.json out without a word, and with it the end of an answer."""
    (llama_folder / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(file)} {why}"):
        weight_files(resolve(str(llama_folder)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "tokenizer.json is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a git-lfs pointer"),
        (b"<html>", "tokenizer.json is an HTML page"),
        (b"null", "the tokenizer cannot be read"),
        (b'{"model": {}', "the tokenizer cannot be read"),
        (b'{"model": {"vocab": [9]}}', "the tokenizer cannot be read"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(content: bytes, why: str, llama_folder: Path) -> None:
    (llama_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(why)) as refused:
        load_tokenizer(resolve(str(llama_folder)))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("key", "value"), [("model_max_length", "long"), ("tokenizer_class", [1]), ("eos_token", 7)])
def test_odd_settings_of_a_tokenizer_are_one_line(key: str, value: Any, llama_folder: Path) -> None:
    write(llama_folder, "tokenizer_config.json", **{key: value})
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(resolve(str(llama_folder)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_hidden_layers", "two"),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -5),
        ("num_hidden_layers", float("nan")),
        ("num_experts", 1e300),
        ("hidden_size", -4),
        ("vocab_size", {}),
        ("quantization_config", "nf4"),
        ("text_config", ["x"]),
    ],
)
def test_odd_values_of_a_config_are_one_line(key: str, value: Any, llama_folder: Path) -> None:
    write(llama_folder, "config.json", **{key: value})
    with pytest.raises(
        UserError, match=r"unreadable config|cannot be loaded|not between 0 and|an object with settings"
    ):
        load_pretrained(resolve(str(llama_folder)), torch.float32)


def test_weights_that_may_not_be_read_are_one_line(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(safety, "open_regular", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(Permission denied\)"):
        safety.check_weights(llama_folder / "model.safetensors", "mine")
