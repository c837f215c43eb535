"""The micro-batches behind `auto`: the largest that fits, chosen once, with the bytes and the steps of that number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.cache.format.folder import read_journal, read_manifest
from distill.cache.making import predict
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment import micro_batch
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.experiment.micro_batch import sizes, with_recorded, with_size
from distill.forecast.forecast import MARGIN_BYTES
from distill.forecast.micro_batch import PHASE_OF, begin, largest, with_micro_batches
from distill.forecast.phases.simulator import NoForecast

SMALL = ["--cache.max_samples", "16"]
CACHE, TRAIN = ("--cache.batch_size", "auto"), ("--train.batch_size", "auto", "--train.step_samples")


class Linear:
    """Forecasts of a model whose memory grows by a GB a sample, on a card of `limit` GB beside the margin."""

    def __init__(self, limit: float, is_cuda: bool = True, fails: bool = False) -> None:
        self.card: Any = SimpleNamespace(is_cuda=is_cuda)
        self.limit_bytes, self.fails = int(limit * 1e9) + MARGIN_BYTES, fails
        self.simulator, self.asked = None, 0

    def needed_bytes(self, experiment: Experiment, phase: str) -> int:
        if self.fails:
            raise NoForecast(f"{phase}: no forecast")
        self.asked += 1
        size = experiment.cache.micro_batch if phase == PHASE_OF["cache.batch_size"] else experiment.train.micro_batch
        return int(1e9 * size)


@pytest.fixture
def experiment(world: Any, tmp_path: Path) -> Callable[..., Experiment]:
    """`experiment(*overrides)`: the world's with shards of 48 samples, and `auto` for both micro-batches."""
    file = world.write(tmp_path / "a.yaml", cache={"shard_samples": 48})
    return lambda *overrides: load_experiment(file, [*CACHE, *TRAIN, "12", *overrides])


def contents(cache: Path) -> dict[str, bytes]:
    """Return the journal and the shards of a cache."""
    return {path.name: path.read_bytes() for path in [cache / "journal.jsonl", *(cache / "shards").iterdir()]}


def test_batches_straddle_no_shard_and_divide_a_step(experiment: Any) -> None:
    assert sizes(experiment(), "cache.batch_size", True) == [1, 2, 4, 8, 16, 32, 48]
    assert sizes(experiment(), "train.batch_size", True) == [1, 2, 3, 4, 6, 12]
    in_backward = experiment("--train.step_in_backward", "true")
    assert sizes(in_backward, "train.batch_size", True) == [12], "an update in every pass allows one pass alone"
    assert sizes(experiment("--corpus.sequence_length", "4096"), "train.batch_size", False) == [1]
    assert max(sizes(experiment(), "cache.batch_size", False)) * 48 <= micro_batch.PROCESSOR_TOKENS


@pytest.mark.parametrize(
    ("limit", "cached", "trained"), [(99, 48, 12), (40, 32, 12), (5, 4, 4), (1, 1, 1), (0.5, 1, 1)]
)
def test_the_largest_that_fits_is_taken_and_a_step_keeps_its_samples(
    experiment: Any, limit: float, cached: int, trained: int
) -> None:
    """With less than one sample's memory the smallest stays, which the preflight refuses with its advice."""
    forecasts = Linear(limit)
    chosen = with_micro_batches(forecasts, experiment(), ("cache-teacher", "train-student"))
    assert (chosen.cache.batch_size, chosen.train.batch_size) == (cached, trained)
    assert chosen.train.batch_size * chosen.train.accumulate_grad_batches == 12 == chosen.train.samples_of_step
    assert forecasts.asked <= 6, "each question is a simulation of seconds"
    one = with_micro_batches(forecasts, experiment(), ("evaluate",))
    assert one == experiment(), "the other phases' batches do not matter to an evaluation"


def test_a_model_without_forecast_is_given_a_number(experiment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for key in PHASE_OF:
        with pytest.raises(UserError, match=f"{key}: auto needs a forecast, and there is none: give a number"):
            begin(Linear(9, fails=True), experiment(), key)
    assert with_micro_batches(Linear(9, fails=True), experiment(), ("train-student",)).train.batch_size == 1
    assert begin(Linear(7), experiment(), "train.batch_size").train.accumulate_grad_batches == 2
    assert "train.batch_size: auto takes 6, 2 passes a step (6 GB of 7.7 GB, by the fo" in capsys.readouterr().out
    assert largest(Linear(7 - MARGIN_BYTES / 1e9, is_cuda=False), experiment(), "train.batch_size") == 6


@pytest.mark.parametrize(
    ("more", "key", "words"),
    [
        (["--cache.part", "1/2"], "cache.batch_size", r"cache\.part: .*--cache\.batch_size 8$"),
        (["--cache.num_nodes", "2"], "cache.batch_size", r"cache\.num_nodes: .*--cache\.batch_size 8$"),
        (["--train.num_nodes", "2"], "train.batch_size", r"train\.num_nodes: .* 6 --train\.accumulate_grad_batches 2$"),
    ],
)
def test_machines_that_share_a_result_must_be_told(experiment: Any, more: list[str], key: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"{key}: auto and {words}"):
        begin(Linear(9), experiment(*more), key)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.batch_size", "auto"], "--train.step_samples 16"),
        (["--train.step_samples", "8"], "goes with train.batch_size auto"),
        ([*TRAIN, "8", "--train.accumulate_grad_batches", "2"], "train.accumulate_grad_batches: follows from"),
        (["--cache.batch_size", "largest"], "cache.batch_size: expected int or 'auto'. Got value: largest"),
        (["--train.batch_size", "4 # of them"], "expected int. Got value: '4 # of them'"),
    ],
)
def test_a_step_has_a_known_number_of_samples(world: Any, tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_experiment(world.write(tmp_path / "a.yaml"), overrides)
    assert words in str(refusal.value)


def test_the_cache_is_that_of_the_number_and_later_starts_keep_to_it(
    world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = world.write(tmp_path / "a.yaml"), tmp_path / "run" / "cache"
    said = distill("cache-teacher", file, *SMALL, *CACHE).done().out
    assert said.count("cache.batch_size: auto takes 8 (") == 1 and "by the forecast" in said
    assert read_manifest(cache).made_with["batch_size"] == "8"
    fixed = tmp_path / "fixed" / "cache"
    distill("cache-teacher", file, *SMALL, "--cache.batch_size", "8", "--cache.dir", str(fixed)).done()
    assert contents(cache) == contents(fixed)
    monkeypatch.setattr(micro_batch, "PROCESSOR_TOKENS", 48)  # as if this were another machine, which takes 1
    for folder in (cache, fixed):
        next((folder / "shards").glob("train-*")).unlink()
    grown = ["--cache.max_samples", "24", *CACHE]
    assert "auto takes" not in distill("cache-teacher", file, *grown).done().out
    distill("cache-teacher", file, *grown, "--cache.batch_size", "8", "--cache.dir", str(fixed)).done()
    assert contents(cache) == contents(fixed), "repaired and grown in the batches that it was begun in"
    assert {entry.batch_size for entry in read_journal(cache).values()} == {8}


def test_memory_that_is_short_of_the_forecast_halves_it_for_good(
    world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is that of the half. A start after a kill takes it from the shard in flight."""
    file, cache, made = world.write(tmp_path / "a.yaml"), tmp_path / "run" / "cache", predict.TeacherModule._records

    def short(module: Any, batches: list[Any]) -> Any:
        if len(batches[0][0]) > 4:
            raise torch.OutOfMemoryError("no room")
        return made(module, batches)

    with monkeypatch.context() as patch:
        patch.setattr(predict.TeacherModule, "_records", short)
        said = distill("cache-teacher", file, *SMALL, *CACHE).done().out
    assert "auto takes 8" in said and "out of memory with 8 samples a forward pass; from here on 4" in said
    fixed = tmp_path / "fixed" / "cache"
    distill("cache-teacher", file, *SMALL, "--cache.batch_size", "4", "--cache.dir", str(fixed)).done()
    assert contents(cache) == contents(fixed)
    experiment = load_experiment(file, [*CACHE])
    assert with_recorded(experiment).cache.batch_size == 4
    anew = replace(experiment, cache=replace(experiment.cache, overwrite=True))
    assert with_recorded(anew).cache.batch_size == "auto"

    records = list(CacheReader(cache, "train"))[:2]
    begun = tmp_path / "begun" / "cache"
    writer = CacheWriter(begun, read_manifest(cache), batch_size=2)
    (begun / "token_order").write_bytes((cache / "token_order").read_bytes())
    writer.add(1, records, 2)
    in_flight = load_experiment(file, [*CACHE, "--cache.dir", str(begun)])
    assert with_recorded(in_flight).cache.batch_size == 2, "what is in flight says more than the manifest's 8"


def test_a_training_learns_as_with_the_number_and_keeps_to_it(
    world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = world.write(tmp_path / "a.yaml"), tmp_path / "run"
    distill("cache-teacher", file, *SMALL).done()
    monkeypatch.setattr(micro_batch, "PROCESSOR_TOKENS", 4 * 48)
    said = distill("train-student", file, *TRAIN, "8").done().out
    assert said.count("train.batch_size: auto takes 4, 2 passes a step (") == 1
    fixed = ["--train.accumulate_grad_batches", "2", "--run_dir", str(tmp_path / "fixed")]
    distill("train-student", file, *fixed, "--cache.dir", str(run / "cache")).done()
    weights = [folder / "student" / "model.safetensors" for folder in (run, tmp_path / "fixed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads((run / "student" / "settings.json").read_text())["samples_a_step"] == 8
    monkeypatch.setattr(micro_batch, "PROCESSOR_TOKENS", 48)
    again = distill("train-student", file, *TRAIN, "8").done().out
    assert "is trained; nothing to do" in again and "auto takes" not in again
    train = with_recorded(load_experiment(file, [*TRAIN, "8"])).train
    assert (train.batch_size, train.accumulate_grad_batches, train.step_samples) == (4, 2, None)
    other = load_experiment(file, [*TRAIN, "6"])
    assert with_recorded(other) == other, "4 does not divide a step of 6, which is another training"
    assert with_size(other, "train.batch_size", 3).train.samples_of_step == 6


def test_a_plan_tells_and_forecasts_the_same(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "a.yaml")
    outcome = distill("plan", file, "--card", "rtx-3060", *CACHE, *TRAIN, "12")
    said = outcome.done().out
    assert "- cache.batch_size: auto takes 8\n" in said
    assert "- train.batch_size: auto takes 12, with accumulate_grad_batches 1\n" in said
    assert "of 12 samples in 1 pass" in said
