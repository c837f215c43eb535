"""The check of a GGUF file passes the student's own and finds another one, with llama.cpp and without."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf is not installed")

from distill.errors import UserError
from distill.export import gguf, gguf_check
from distill.models.checkpoints import Checkpoint
from distill.models.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
COMPARISON = gguf_check.Comparison(3.0, 3.0, 200, 8, [], 160, 160, 0)


@pytest.fixture(scope="module")
def student(hugging_face_student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "student"
    return hugging_face_student(folder, "llama", max_position_embeddings=256, initializer_range=0.15)


@pytest.fixture(scope="module")
def other(hugging_face_student: Any, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that is the same but for another rotation of its queries and keys."""
    folder = tmp_path_factory.mktemp("check") / "other"
    return hugging_face_student(
        folder, "llama", max_position_embeddings=256, initializer_range=0.15, num_key_value_heads=4
    )


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "xllamacpp" else find(name, *more)
    )


@needs_llama_cpp
def test_llama_cpp_is_asked_where_it_is(student: Path, tmp_path: Path) -> None:
    gguf.write(student, tmp_path, "f16")
    line = gguf.check(student, tmp_path, "f16")
    assert "llama.cpp makes the same tokens of 8 texts" in line and "KL to the student 0.00" in line


@needs_llama_cpp
def test_llama_cpp_finds_another_model(student: Path, other: Path, tmp_path: Path) -> None:
    gguf.write(other, tmp_path, "f16")
    with pytest.raises(UserError, match=r"f16\.gguf: llama\.cpp answers otherwise than the student: KL [\d.]+ nats"):
        gguf.check(student, tmp_path, "f16")


@needs_llama_cpp
def test_a_file_that_llama_cpp_does_not_load_is_told(student: Path, tmp_path: Path) -> None:
    gguf.write(student, tmp_path, "f16")
    file = gguf.file(tmp_path, "f16")
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"llama\.cpp does not run it"):
        gguf.check(student, tmp_path, "f16")


@pytest.mark.parametrize("type", gguf.TYPES)
def test_without_llama_cpp_transformers_reads_it(
    type: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    gguf.write(student, tmp_path, type)
    line = gguf.check(student, tmp_path, type)
    assert "read back by transformers" in line and "llama.cpp itself did not try it" in line
    assert "pip install 'distill-small-card[gguf]'" in line


def test_without_llama_cpp_another_model_is_found_too(
    student: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    gguf.write(other, tmp_path, "f16")
    with pytest.raises(UserError):
        gguf.check(student, tmp_path, "f16")


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_transformers_reads_every_family_it_knows(
    family: str, sizes: dict[str, Any], hugging_face_student: Any, tmp_path: Path
) -> None:
    source = hugging_face_student(tmp_path / "student", family, **sizes)
    gguf.write(source, tmp_path, "f16")
    checkpoint = Checkpoint(source, None, family)
    ids = load_tokenizer(checkpoint).encode(gguf_check.PASSAGE)[:200]
    seen = gguf_check.compare_by_transformers(checkpoint, gguf.file(tmp_path, "f16"), ids)
    assert abs(seen.drift) < 3e-4


def test_a_family_that_transformers_does_not_read_needs_llama_cpp(
    hugging_face_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    source = hugging_face_student(tmp_path / "student", "gemma")
    gguf.write(source, tmp_path, "f16")
    with pytest.raises(UserError, match=r"only llama\.cpp can check it.*pip install 'distill-small-card"):
        gguf.check(source, tmp_path, "f16")


@needs_llama_cpp
def test_a_crash_of_llama_cpp_is_survived(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf.write(student, tmp_path, "f16")
    monkeypatch.setattr(gguf_check, "PROGRAM", ("-c", "import os; os.kill(os.getpid(), 4)"))
    line = gguf.check(student, tmp_path, "f16")
    assert "it crashed here (SIGILL)" in line and "read back by transformers" in line


@pytest.mark.parametrize(
    ("type", "change", "words"),
    [
        ("f16", {"theirs": 3.0 + math.log(1.011)}, "off by more than 1%"),
        ("f16", {"theirs": 3.0 - math.log(1.011)}, "off by more than 1%"),
        ("q8_0", {"theirs": 3.0 + math.log(1.021)}, "off by more than 2%.*--type f16"),
        ("q4_0", {"theirs": 3.0 + math.log(1.101)}, "off by more than 10%.*--type q8_0"),
        ("f16", {"theirs": float("nan")}, "off by more than"),
        ("q4_0", {"theirs": 3.0 + math.log(1.157), "kl": 0.1}, "off by more than 10%"),
        ("f16", {"kl": 0.011}, "KL 0.011 nats a token, more than 0.01"),
        ("q8_0", {"kl": float("nan")}, "KL nan.*--type f16"),
        ("q4_0", {"other_texts": ["a b"]}, "1 of 8 texts into other tokens.*'a b'"),
        ("f16", {"best": 158, "ties": 1}, "continues prompts otherwise: 1 of 160"),
    ],
)
def test_what_does_not_hold_is_told(type: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        gguf_check._verdict(replace(COMPARISON, **change), Path("model.gguf"), type)


@pytest.mark.parametrize(
    ("type", "change"),
    [
        ("f16", {"theirs": 3.0 + math.log(1.009), "best": 158, "ties": 2}),
        ("q8_0", {"theirs": 3.0 + math.log(1.019), "best": 100}),
        ("q4_0", {"theirs": 3.0 + math.log(1.099), "best": 50}),
    ],
)
def test_what_holds_is_said(type: str, change: dict[str, Any]) -> None:
    assert "perplexity 20.09" not in gguf_check._verdict(replace(COMPARISON, **change), Path("model.gguf"), type)
    assert "of 160 tokens" in gguf_check._verdict(replace(COMPARISON, **change), Path("model.gguf"), type)


def test_a_mixture_may_take_another_expert_for_one_token_in_twenty() -> None:
    file, switched = Path("model.gguf"), gguf_check.SWITCHED
    assert "152 of 160" in gguf_check._verdict(replace(COMPARISON, best=152), file, "f16", switched)
    with pytest.raises(UserError, match="9 of 160"):
        gguf_check._verdict(replace(COMPARISON, best=151), file, "f16", switched)


def test_the_likelihood_is_that_of_every_next_token(student: Path) -> None:
    from distill.plugins import load_language_model

    model = load_language_model(student)
    windows = [[5, 6, 7, 8], [9, 10, 11]]
    nll, positions = gguf_check._nll(model, windows, 270)
    with torch.no_grad():
        by_hand = [
            -float(torch.log_softmax(model.model(torch.tensor([w])).logits[0, i, :270].double(), -1)[w[i + 1]])
            for w in windows
            for i in range(len(w) - 1)
        ]
    assert positions == len(by_hand) == 5
    assert nll == pytest.approx(sum(by_hand) / 5, rel=1e-5)


def test_the_text_may_be_the_users(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_llama_cpp(monkeypatch)
    gguf.write(student, tmp_path, "f16")
    tokens = len(load_tokenizer(Checkpoint(student, None, "")).encode("some words of mine"))
    assert f"{tokens - 1} tokens" in gguf.check(student, tmp_path, "f16", "some words of mine")


def test_a_text_without_a_second_token_is_refused(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    gguf.write(student, tmp_path, "f16")
    with pytest.raises(UserError, match="fewer than two tokens"):
        gguf.check(student, tmp_path, "f16", "x")


SERVER = """
import http.server, json, os, threading
from types import SimpleNamespace

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()

class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"tokens": [1]}).encode())

class Server:
    def __init__(self, parameters):
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
        self.listening_address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __del__(self):
        open(os.environ["TAKEN_DOWN"], "w").close()
"""
"""A llama.cpp that leaves a file when its server is taken down, where the real one now and then waits for ever."""


def test_its_server_is_never_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xllamacpp.py").write_text(SERVER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TAKEN_DOWN", str(tmp_path / "taken-down"))
    request = {"file": "a.gguf", "threads": 1, "texts": ["a"], "prompts": [], "new_tokens": 0, "ids": [1], "places": []}
    found = gguf_check._ask(request | {"vocabulary": 2, "logp": str(tmp_path / "logp.npy")})
    assert found["tokens"] == [[1]] and not (tmp_path / "taken-down").exists()
