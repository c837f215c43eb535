"""The order of a real cache's tokens: it changes no target, goes along with its parts, and is healed when broken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import default_collate

from distill.cache.format.folder import TOKEN_ORDER
from distill.cache.format.records import Record
from distill.cache.format.token_order import token_counts
from distill.cache.making.predict import TeacherModule
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment.file import load_experiment
from distill.experiment.place import Place
from distill.experiment.teacher import Teacher, open_samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def real(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The experiment file of a finished cache of 24 samples in three shards of eight."""
    cache = {"max_samples": 16, "threshold": 0.01}
    file: str = world.write(tmp_path_factory.mktemp("real") / "experiment.yaml", cache=cache)
    distill("cache-teacher", file).done()
    return file


@pytest.fixture
def copy(real: str, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(Path(real).parent / "run/cache", tmp_path / "cache"))


def test_a_cache_holds_what_the_corpus_and_the_teacher_say(real: str, assert_same: Any) -> None:
    """Bit for bit the samples and targets that are made directly, where nothing knows of an order."""
    experiment = load_experiment(real, [])
    teacher = Teacher(experiment, Place.of(experiment))
    samples = open_samples(experiment, teacher).train
    reader = CacheReader(Path(real).parent / "run/cache", "train")
    manifest = reader.manifest
    module = TeacherModule(teacher.load(), manifest.vocab_size, manifest.make_scheme(), seed=0)
    direct: list[Record] = []
    for start in range(0, 16, 4):
        rows = [samples[index] for index in range(start, start + 4)]
        direct += module.predict_step(default_collate(rows), 0)
    assert len(reader) == 16
    for index, record in enumerate(direct):
        assert reader[index].input_ids_L.tolist() == samples[index]["input_ids"].tolist()
        assert_same(replace(reader[index], documents=None), record)
        documents = reader[index].documents
        assert documents is not None
        hash_L = documents.hashes.repeat(np.diff([*np.flatnonzero(record.position_ids_L == 0), 48])).view(np.int64)
        assert hash_L.tolist() == samples[index]["document_hash"].tolist() and not documents.sources.any()
    assert manifest.sources == ["corpus.jsonl"]

    # The order is that of the first training shard, however many there are.
    counts_V = token_counts(samples, 8, manifest.vocab_size)
    assert (np.diff(counts_V[reader.order.tokens_V]) <= 0).all() and not reader.order.is_by_id


@pytest.mark.parametrize("broken", ["missing", "flipped", "longer", "absurd"])
def test_a_broken_order_is_refused_found_and_healed(
    real: str, copy: Path, distill: Any, tmp_path: Path, broken: str
) -> None:
    path = copy / TOKEN_ORDER
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    if broken == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        changed = {"flipped": content[:-1] + bytes([content[-1] ^ 4]), "longer": content + b"x", "absurd": b"\xff" * 9}
        path.write_bytes(changed[broken])
    problem = "missing" if broken == "missing" else "has changed"
    with pytest.raises(UserError, match=rf"token_order: {problem}.*run `distill cache-teacher` again"):
        CacheReader(copy, "train")
    distill("inspect", copy).refused("token_order", problem)
    verified = distill("inspect", copy, "--verify")
    assert verified.status == 1 and f"token_order {'is ' * (broken == 'missing')}{problem}" in verified.out
    if broken != "missing":
        assert "token_order has changed" in distill("inspect", copy, "--repair").done().out
        assert not path.exists()
    distill("cache-teacher", real, "--cache.dir", copy).done()
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
    distill("inspect", copy, "--verify").done()


def test_training_from_a_broken_order_is_refused(real: str, copy: Path, distill: Any, tmp_path: Path) -> None:
    (copy / TOKEN_ORDER).write_bytes(b"\0")
    own = ("--cache.dir", copy, "--run_dir", tmp_path / "run")
    distill("train-student", real, *own).refused("token_order: has changed", "run `distill cache-teacher` again")


def test_parts_share_an_order_and_merging_carries_it_along(
    real: str, distill: Any, tmp_path: Path, assert_same: Any
) -> None:
    whole = Path(real).parent / "run/cache"
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        distill("cache-teacher", real, "--cache.dir", part, "--cache.part", f"{number}/2").done()
        assert (part / TOKEN_ORDER).read_bytes() == (whole / TOKEN_ORDER).read_bytes()
    content = (parts[0] / TOKEN_ORDER).read_bytes()
    (parts[0] / TOKEN_ORDER).unlink()
    distill("merge", *parts, "--to", tmp_path / "merged").refused(str(parts[0] / TOKEN_ORDER), "missing")
    assert not list((tmp_path / "merged").glob("*"))
    (parts[0] / TOKEN_ORDER).write_bytes(content)
    distill("merge", *parts, "--to", tmp_path / "merged").done()
    assert (tmp_path / "merged" / TOKEN_ORDER).read_bytes() == content
    for one, other in zip(CacheReader(whole, "train"), CacheReader(tmp_path / "merged", "train"), strict=True):
        assert_same(one, other)
