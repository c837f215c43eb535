"""A GGUF file's header is read once for all that transformers takes from it, and anew when the file has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from distill.models.checkpoints import load_config, resolve
from distill.models.gguf_header import plain_reader, reading_gguf
from distill.models.tokenizers import load_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the headers that transformers has really read."""
    from transformers import modeling_gguf_pytorch_utils as theirs

    found: list[str] = []
    load = theirs.load_gguf_checkpoint

    def counted(path: str, *args: Any, **options: Any) -> Any:
        found.append(path)
        return load(path, *args, **options)

    monkeypatch.setattr(theirs, "load_gguf_checkpoint", counted)
    return found


def write(file: Path, tokenizer: Any, blocks: int) -> str:
    """Write the header of a model, and return its name."""
    content, ids = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(blocks)
    writer.add_vocab_size(len(ids))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(ids, key=ids.get))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(ids["<s>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(file)


def test_the_header_is_read_once(tokenizer: Any, tmp_path: Path, reads: list[str]) -> None:
    name = write(tmp_path / "a.gguf", tokenizer, 3)
    config, found = load_config(resolve(name)), load_tokenizer(resolve(name))
    assert len(reads) == 1
    theirs = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="a.gguf")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert len(reads) > 1, "outside, the library reads as it does"
    assert config.to_dict() == theirs.to_dict()
    assert found.backend_tokenizer.get_vocab(False) == own.backend_tokenizer.get_vocab(False)


def test_a_file_that_has_changed_is_read_anew(tokenizer: Any, tmp_path: Path, reads: list[str]) -> None:
    name = write(tmp_path / "a.gguf", tokenizer, 3)
    assert load_config(resolve(name)).num_hidden_layers == 3
    write(tmp_path / "a.gguf", tokenizer, 5)
    assert load_config(resolve(name)).num_hidden_layers == 5 and len(reads) == 2


def test_no_caller_sees_the_changes_of_another(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as theirs

    name = write(tmp_path / "a.gguf", tokenizer, 3)
    with reading_gguf(name):
        theirs.load_gguf_checkpoint(name)["config"].clear()
        assert theirs.load_gguf_checkpoint(name)["config"]["num_hidden_layers"] == 3


def test_the_plain_reader_finds_the_same(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("output.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, own = plain_reader()(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(own.fields) and type(ours.data) is np.ndarray
    assert np.array_equal(ours.tensors[0].data, values) and np.array_equal(own.tensors[0].data, values)
