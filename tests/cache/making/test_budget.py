"""Budgets: a threshold for a size, a forecast before anything is written, and advice that helps when it is followed."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distill.cache.format.manifest import read_manifest
from distill.cache.format.records import encode
from distill.cache.format.token_order import TokenOrder
from distill.cache.making.budget import HIGHEST, LOWEST, SizeProbe
from distill.cache.making.predict import TeacherModule
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment.cache import make_manifest, make_token_order
from distill.experiment.file import load_experiment
from distill.experiment.place import Place
from distill.experiment.teacher import Teacher, open_samples
from distill.targets.schemes import RandomDraws, VarOpt

pytestmark = pytest.mark.usefixtures("one_thread")


# The probe itself.


class Bench:
    """The world's teacher over its first samples."""

    def __init__(self, file: str, order: TokenOrder | None = None) -> None:
        experiment = load_experiment(file, [])
        teacher = Teacher(experiment, Place.of(experiment))
        samples = open_samples(experiment, teacher)
        self.order = order or make_token_order(experiment, teacher, samples)
        self.manifest = make_manifest(experiment, teacher, samples, self.order)
        scheme = self.manifest.make_scheme()
        module = TeacherModule(teacher.load(), teacher.vocab_size, scheme, seed=self.manifest.seed)
        self.probe = SizeProbe(module, self.order, samples.train, 10, 4, teacher.device)


@pytest.fixture(scope="module")
def bench(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(world.write(tmp_path_factory.mktemp("bench") / "experiment.yaml"))


def test_it_looks_at_no_more_samples_than_there_are(bench: Bench) -> None:
    assert bench.probe.tokens == 10 * 48


def test_a_higher_threshold_makes_smaller_records(bench: Bench) -> None:
    thresholds = (LOWEST, 0.01, 0.02, 0.05, 0.2, HIGHEST)
    sizes = [bench.probe.bytes_per_token(VarOpt(threshold)) for threshold in thresholds]
    assert all(one > other for one, other in pairwise(sizes)), sizes


def test_the_chosen_threshold_takes_what_was_asked_and_no_more(bench: Bench) -> None:
    sizes = [bench.probe.bytes_per_token(VarOpt(bound)) for bound in (HIGHEST, LOWEST)]
    for share in (0.0, 0.1, 0.3):
        asked = sizes[0] + share * (sizes[1] - sizes[0])
        chosen = bench.probe.threshold_for(asked, VarOpt(0.02))
        assert float(f"{chosen.threshold:.3g}") == chosen.threshold
        assert 0.9 * asked <= bench.probe.bytes_per_token(chosen) <= asked


def test_a_size_beyond_all_thresholds_is_refused(bench: Bench) -> None:
    for asked in (1.0, 1e4, float("nan")):
        with pytest.raises(UserError, match=r"cannot be had.*thresholds from 0.5 to 0.002 take \d+\.\d to \d+\.\d"):
            bench.probe.threshold_for(asked, VarOpt(0.02))


def test_what_is_advised_depends_on_the_scheme_and_fits(bench: Bench) -> None:
    probe, manifest = bench.probe, bench.manifest
    tokens = manifest.samples * manifest.sequence_length
    size = probe.bytes_per_token(VarOpt(0.01))
    assert probe.check_size(VarOpt(0.01), manifest, f"{size * tokens + 1:.0f}B") == size

    def advice(scheme: Any, share: float) -> str:
        with pytest.raises(UserError) as refused:
            probe.check_size(scheme, manifest, f"{share * tokens * probe.bytes_per_token(scheme):.0f}B")
        return str(refused.value)

    assert "--cache.bytes_per_token" in advice(VarOpt(0.01), 0.6) and "--cache.max_samples" in advice(VarOpt(0.01), 0.6)
    assert "--cache.bytes_per_token" not in advice(VarOpt(0.01), 0.01)  # no threshold makes records so small
    assert "--cache.max_samples" not in advice(VarOpt(0.01), 0.01)  # the held-out samples alone take more
    assert "--cache.bytes_per_token" not in advice(RandomDraws(20), 0.6)
    assert "--cache.max_samples" in advice(RandomDraws(20), 0.6)


# The commands.


@pytest.fixture
def cache(world: Any, distill: Any, tmp_path: Path) -> Callable[..., Any]:
    """`cache("--cache.max_size", "1MB")`: run cache-teacher in the test's own run folder."""
    file = world.write(tmp_path / "experiment.yaml", cache={"max_samples": 16, "held_out_samples": 8})
    return lambda *arguments: distill("cache-teacher", file, *arguments)


def untouched(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with the time of its last change: equal before and after, nothing was written."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def nothing_was_written(folder: Path) -> bool:
    return not any(path.is_file() for path in (folder / "run").rglob("*"))


def test_a_threshold_is_chosen_kept_and_accepted_by_training(world: Any, distill: Any, tmp_path: Path) -> None:
    """One experiment file from the probe to the student, which need not know the threshold."""
    budget = {"bytes_per_token": 30.0, "max_samples": 40, "held_out_samples": 8}
    file = world.write(tmp_path / "experiment.yaml", cache=budget, train={"max_steps": 1})
    said = distill("cache-teacher", file).done().out
    folder = tmp_path / "run" / "cache"
    reader = CacheReader(folder, "train")
    threshold = read_manifest(folder).scheme_parameters["threshold"]
    assert f"threshold {threshold:g} takes about 30 bytes a token" in said and threshold != 0.02
    size = sum(len(encode(reader.order.ranked(record), reader.scheme)) for record in reader)
    assert 27 <= size / (40 * 48) <= 30  # all of its training samples were calibrated on

    before = untouched(folder)
    assert "nothing to do" in distill("cache-teacher", file).done().out
    assert "nothing to do" in distill("cache-teacher", file, "--cache.overwrite", "true").done().out
    assert untouched(folder) == before
    (folder / "shards" / "train-000001.safetensors").unlink()
    continued = distill("cache-teacher", file).done().out
    assert "continuing" in continued and "takes about" not in continued
    assert read_manifest(folder).scheme_parameters["threshold"] == threshold

    distill("train-student", file).done()
    refused = distill(
        "train-student", file, "--cache.bytes_per_token", 31, "--run_dir", tmp_path, "--cache.dir", folder
    )
    refused.refused(f"threshold: expected 0.02, found {threshold:g}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache.bytes_per_token", "2"], ["2 cannot be had", "thresholds from 0.5 to 0.002"]),
        (["--cache.bytes_per_token", "5000"], ["5000 cannot be had"]),
        (["--cache.bytes_per_token", "-1"], ["-1.0 is not between 1 and"]),
        (["--cache.bytes_per_token", "30", "--cache.scheme", "top_k"], ["varopt's threshold", "top_k has none"]),
        (["--cache.bytes_per_token", "30", "--cache.scheme", "hidden"], ["varopt's threshold", "hidden has none"]),
        (["--cache.bytes_per_token", "30", "--cache.part", "1/2"], ["one threshold", "--cache.threshold"]),
        (["--cache.bytes_per_token", "30", "--cache.devices", "2"], ["one threshold", "--cache.threshold"]),
        (["--cache.max_size", "much"], ["'much' is not a size"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_refused_before_anything_is_written(cache: Any, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    cache(*arguments).refused(arguments[0].removeprefix("--"), *words)
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize("scheme", ["varopt", "top_k"])
def test_advice_that_is_followed_helps(cache: Any, tmp_path: Path, scheme: str) -> None:
    base = ["--cache.scheme", scheme, "--cache.max_size", "40kB", "--cache.threshold", "0.01"]
    refused = cache(*base)
    refused.refused("cache.max_size: the forecast is", "over 40kB")
    assert nothing_was_written(tmp_path)
    options = ["--cache.max_samples"] + ["--cache.bytes_per_token"] * (scheme == "varopt")
    for option in options:
        value = re.search(rf"{option} ([\d.]+\d|\d)", refused.err)
        assert value, refused.err
        folder = tmp_path / option
        assert "forecast" in cache(*base, option, value[1], "--cache.dir", folder).done().out
        shards = sum(path.stat().st_size for path in (folder / "shards").iterdir())
        assert shards < 1.1 * 40_000  # forecast from the records of the first samples
    raised = re.search(r"raise it to ([\d.]+MB)", refused.err)
    assert raised
    cache(*base[:2], "--cache.max_size", raised[1], "--cache.threshold", "0.01").done()


def test_a_cache_that_is_there_is_not_forecast_again(cache: Any) -> None:
    cache().done()
    assert "nothing to do" in cache("--cache.max_size", "1kB").done().out
