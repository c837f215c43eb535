"""`distill cache-teacher`: continued to the last byte after an interruption, and refused for what cannot be cached."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0
"""Seconds that a process of its own may take on a busy machine."""

# One sample a shard and few positions a chunk: slow enough for a signal to find it at work.
SLOWLY = ["--cache.shard_samples", "1", "--cache.chunk_size", "4", "--cache.max_samples", "32"]


@pytest.fixture
def cache(world: Any, distill: Any, tmp_path: Path) -> Callable[..., Any]:
    """`cache("--cache.seed", 1)`: run cache-teacher on the world's experiment in the test's own run folder."""
    file = world.write(tmp_path / "experiment.yaml")
    return lambda *arguments: distill("cache-teacher", file, "--cache.max_samples", 16, *arguments)


def test_interrupted_by_ctrl_c_it_continues_to_the_same_bytes(
    world: Any, distill: Any, stop: Any, contents: Any, tmp_path: Path
) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    journal = tmp_path / "run/cache/journal.jsonl"
    stopped = stop(
        signal.SIGINT,
        lambda out: journal.exists() and journal.read_bytes().count(b"\n") >= 3,
        *("cache-teacher", file, *SLOWLY),
    )
    assert stopped.status == 130, stopped
    assert "Traceback" not in stopped.err
    assert stopped.err.strip().splitlines()[-1] == (
        f"stopped; everything so far is kept. To go on: distill cache-teacher {file} {' '.join(SLOWLY)}"
    )
    shards = journal.read_bytes().count(b"\n")
    continued = distill("cache-teacher", file, *SLOWLY).done()
    assert f"{shards} of 40 shards are there; continuing" in continued.out
    undisturbed = tmp_path / "undisturbed"
    distill("cache-teacher", file, *SLOWLY, "--cache.dir", undisturbed).done()
    assert contents(tmp_path / "run/cache") == contents(undisturbed)


def test_at_the_end_of_its_time_it_keeps_every_batch(cache: Any, contents: Any, tmp_path: Path) -> None:
    """`0s` is over after one batch: each start makes one more of the only training shard."""
    undisturbed = ["--cache.batch_size", 6, "--cache.shard_samples", 16, "--cache.held_out_samples", 0]
    cache(*undisturbed, "--cache.dir", tmp_path / "undisturbed").done()
    for _ in range(2):
        stopped = cache(*undisturbed, "--cache.max_time", "0s")
        assert stopped.status == 130 and "cache.max_time is over" in stopped.out and "To go on" in stopped.err, stopped
        assert (tmp_path / "run/cache/shards/train-000000.batches").exists()
    cache(*undisturbed, "--cache.max_time", "2h").done()
    assert contents(tmp_path / "run/cache") == contents(tmp_path / "undisturbed")
    cache("--cache.max_time", "soon").refused("cache.max_time: 'soon'", "11h30m")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("broken", ["full", "unread", "closed"])
def test_a_broken_output_does_not_end_the_run(world: Any, program: Any, tmp_path: Path, broken: str) -> None:
    command = ["cache-teacher", world.write(tmp_path / "experiment.yaml"), "--cache.max_samples", "4"]
    if broken == "closed":  # from the program's beginning
        line = f"{shlex.join([sys.executable, '-m', 'distill', *command])} >&- 2>&-"
        assert subprocess.run(["bash", "-c", line], timeout=PATIENCE).returncode == 0
    else:
        unread, to = os.pipe()
        os.close(unread)
        if broken == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), to)
        assert program(command, to, to).wait() == 0
        os.close(to)
    assert {path.name for path in (tmp_path / "run/cache/shards").iterdir()} >= {"train-000000.safetensors"}


def test_a_lost_shard_is_made_again(cache: Any, contents: Any, tmp_path: Path) -> None:
    cache().done()
    before = contents(tmp_path / "run/cache")
    (tmp_path / "run/cache/shards/train-000000.safetensors").unlink()
    assert "continuing" in cache().done().out
    assert contents(tmp_path / "run/cache") == before


def test_a_second_start_does_nothing(cache: Any, untouched: Any, tmp_path: Path) -> None:
    cache().done()
    before = untouched(tmp_path / "run")
    assert "nothing to do" in cache().done().out
    assert untouched(tmp_path / "run") == before


def test_the_tokenizer_lies_beside_the_cache(cache: Any, world: Any, tmp_path: Path) -> None:
    """So that a student is trained without the teacher at hand."""
    from transformers import AutoTokenizer

    cache().done()
    ours = AutoTokenizer.from_pretrained(tmp_path / "run/cache/tokenizer")
    theirs = AutoTokenizer.from_pretrained(world.content["teacher"]["model"])
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--cache.threshold", "0.05"], ["threshold: expected 0.05, found 0.02"]),
        (["--cache.scheme", "top_k"], ["scheme: expected top_k, found varopt"]),
        (["--cache.seed", "1"], ["seed: expected 1, found 0"]),
        (["--corpus.sequence_length", "32"], ["sequence_length: expected 32, found 48"]),
        (["--corpus.held_out", "0.3"], ["fingerprints.packing"]),
        (["--teacher.quantization", "nf4"], ["fingerprints.quantization: expected nf4, float32, found none, float32"]),
        (["--teacher.compute_dtype", "bfloat16"], ["fingerprints.quantization: expected none, bfloat16"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_cache_made_with_other_settings_is_left_alone(
    cache: Any, untouched: Any, tmp_path: Path, changed: list[str], words: list[str]
) -> None:
    cache().done()
    before = untouched(tmp_path / "run")
    cache(*changed).refused(
        str(tmp_path / "run/cache"), "made from something else", *words, "--cache.dir", "--cache.overwrite"
    )
    assert untouched(tmp_path / "run") == before


def test_a_finished_cache_grows_and_a_part_of_it_is_used(
    cache: Any, distill: Any, world: Any, contents: Any, untouched: Any, tmp_path: Path
) -> None:
    """Full shards stay byte for byte, a last short one is read again; the whole is the one made in one go."""
    folder, shards = tmp_path / "run/cache", ["--cache.shard_samples", 6]
    for size in (10, 29):
        cache(*shards, "--cache.max_samples", size, "--cache.held_out_samples", 2 + size // 7, "--cache.dir",
              tmp_path / str(size)).done()  # fmt: skip
    shutil.copytree(tmp_path / "10", folder)
    full = folder / "shards/train-000000.safetensors"
    before = full.stat().st_mtime_ns
    grown = cache(*shards, "--cache.max_samples", 29, "--cache.held_out_samples", 6).done()
    assert "1 of 6 shards are there; continuing" in grown.out and full.stat().st_mtime_ns == before
    assert contents(folder) == contents(tmp_path / "29")
    before = untouched(folder)
    assert "nothing to do" in cache(*shards, "--cache.max_samples", 10, "--cache.held_out_samples", 3).done().out
    cache(*shards, "--cache.max_samples", 40, "--cache.part", "1/2").refused("merge its parts", "--cache.part")
    assert untouched(folder) == before
    file = world.write(tmp_path / "train.yaml", train={"max_steps": 1})
    small = [*shards, "--cache.max_samples", 10, "--cache.held_out_samples", 3]
    distill("train-student", file, *small).done()
    settings = json.loads((tmp_path / "run/student/settings.json").read_text())
    assert settings["cache"]["splits"] == {"held_out": 3, "train": 10}
    (folder / "shards/train-000004.safetensors").unlink()
    distill("cache-teacher", file, *small).done()
    assert "nothing to do" in distill("train-student", file, *small).done().out, "what is not used may be missing"


def test_a_cache_of_another_teacher_or_corpus_is_left_alone(
    world: Any, cache: Any, untouched: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    cache().done()
    before = untouched(tmp_path / "run")
    other = Path(shutil.copytree(world.content["teacher"]["model"], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + torch.tensor(1e-3)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    cache("--teacher.model", other).refused("fingerprints.teacher_weights: expected", "…, found")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(Path(world.content["corpus"]["path"]).read_text().replace("peace", "piece"))
    cache("--corpus.path", corpus).refused("fingerprints.corpus: expected")
    assert untouched(tmp_path / "run") == before


def test_overwrite_makes_it_anew_and_only_when_it_differs(cache: Any, untouched: Any, tmp_path: Path) -> None:
    cache().done()
    before = untouched(tmp_path / "run")
    assert "nothing to do" in cache("--cache.overwrite").done().out
    assert untouched(tmp_path / "run") == before
    cache("--cache.overwrite", "--cache.seed", 1).done()
    assert json.loads((tmp_path / "run/cache/manifest.json").read_text())["seed"] == 1
    assert (tmp_path / "run/cache/tokenizer/tokenizer.json").is_file()


def test_a_cache_without_a_shard_is_taken_over(cache: Any, untouched: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run/cache"
    cache().done()
    (folder / "journal.jsonl").write_bytes(b"")
    for shard in (folder / "shards").iterdir():
        shard.unlink()
    (folder / "batches").write_text("finished ones, say")  # a file that is not known may hold the teacher's work
    before = untouched(folder)
    cache("--cache.seed", 1).refused("made from something else", "seed: expected 1, found 0")
    assert untouched(folder) == before
    (folder / "batches").unlink()
    cache("--cache.seed", 1).done()
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 1
    cache("--cache.seed", 2).refused("seed: expected 2, found 1")


def test_a_folder_that_is_no_cache_is_left_alone(cache: Any, untouched: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    before = untouched(mine)
    cache("--cache.dir", mine, "--cache.overwrite").refused(str(mine), "not a cache, and not empty", "--cache.dir")
    assert untouched(mine) == before


def corpus_file(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ["empty.jsonl", "no document"]),
        ("blank.jsonl", b'{"text": "  "}\n', ["blank.jsonl", "no document with any text"]),
        ("latin.txt", "Señor".encode("latin-1"), ["latin.txt", "not UTF-8", "convert"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["broken.jsonl", "row 2", "not JSON"]),
        ("column.jsonl", b'{"txt": "a"}\n', ["row 1", "no column 'text'", "did you mean 'txt'?", "corpus.columns"]),
        ("number.jsonl", b'{"text": 3}\n', ["row 1", "'text' is int, not text"]),
        ("surrogate.jsonl", b'{"text": "a\\ud800b"}\n', ["row 1", "not text"]),
        ("one.jsonl", b'{"text": "A single document."}\n', ["one.jsonl", "corpus.held_out"]),
        ("corpus.pdf", b"%PDF", ["corpus.pdf", "not a format that can be read", ".jsonl"]),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00", ["cut.jsonl.gz", "damaged or incomplete gzip"]),
    ],
)
def test_a_corpus_that_cannot_be_read_is_one_line(
    cache: Any, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    path = corpus_file(tmp_path / "corpora", name, content)
    cache("--corpus.path", path).refused(*words)
    assert not (tmp_path / "run/cache").exists()


def test_a_missing_corpus_names_the_nearest(cache: Any, world: Any, tmp_path: Path) -> None:
    cache("--corpus.path", world.folder / "corpsu.jsonl").refused("no such file or folder", "corpus.jsonl'?")
    cache("--corpus.path", tmp_path / "nowhere").refused("no such file or folder")
    (tmp_path / "hollow").mkdir()
    cache("--corpus.path", tmp_path / "hollow").refused("no corpus file in this folder")


def test_a_teacher_that_is_not_there_names_the_nearest(cache: Any, world: Any) -> None:
    cache("--teacher.model", world.folder / "teahcer").refused("no such file or folder", "teacher'?")
    cache("--teacher.model", "smollm2-135-demo").refused("did you mean 'smollm2-135m-demo'?")
    cache("--teacher.class_path", "hugingface").refused("did you mean 'huggingface'?")
    cache("--teacher.options", "{layer: 3}").refused("unknown option 'layer'")
    cache("--teacher.tokenizer", world.folder / "tokeniser").refused("no such tokenizer folder")
    cache("--train.accelerator", "gpus").refused("train.accelerator", "'gpus' is unknown", "cpu")


def test_a_sequence_beyond_the_models_is_refused(cache: Any, tmp_path: Path) -> None:
    cache("--corpus.sequence_length", 257).refused("corpus.sequence_length", "257", "256 tokens")
    assert not (tmp_path / "run/cache").exists()
    cache("--corpus.sequence_length", 256).done()


def test_a_tokenizer_with_more_tokens_than_the_head_is_refused(world: Any, cache: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.content["teacher"]["model"])
    tokenizer.add_tokens([f"<extra {number}>" for number in range(14)])  # the head has 13 padding rows
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    refusal = cache("--teacher.tokenizer", tmp_path / "tokenizer")
    refusal.refused("413 rows", "414 tokens", "not the same vocabulary")


@pytest.mark.parametrize("key", ["--run_dir", "--cache.dir"])
def test_a_folder_that_cannot_be_written_is_refused(cache: Any, tmp_path: Path, key: str) -> None:
    (tmp_path / "occupied").write_text("a file")
    cache(key, tmp_path / "occupied" / "run").refused(str(tmp_path / "occupied"))
    cache(key, tmp_path / "occupied").refused(str(tmp_path / "occupied"))
    assert (tmp_path / "occupied").read_text() == "a file"


def test_a_recurrent_teacher_reads_a_document_a_row(make_teacher: Any, cache: Any, tmp_path: Path) -> None:
    said = cache("--teacher.model", make_teacher("mamba2")).done().out
    assert said.count("each is read in a row of its own") == 1
    assert json.loads((tmp_path / "run/cache/manifest.json").read_text())["pack"] is True
