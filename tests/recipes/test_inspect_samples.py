"""`distill inspect` of what the samples hold: statistics, one sample to look at, and against the teacher itself."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache.reading.reader import CacheReader
from distill.cache.reading.statistics import gather

pytestmark = pytest.mark.usefixtures("one_thread")

CACHES: dict[str, dict[str, Any]] = {
    "varopt": {"scheme": "varopt", "threshold": 0.1},
    "top_k": {"scheme": "top_k", "entries": 12},
    "random": {"scheme": "random", "entries": 20},
    "hidden": {"scheme": "hidden"},
    "warm": {"scheme": "varopt", "threshold": 0.1, "temperature": 2.0},
}


@pytest.fixture(scope="module")
def caches(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`caches("hidden")`: a small cache of that kind, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            sizes = {"max_samples": 8, "held_out_samples": 8}
            distill("cache-teacher", world.write(folder / "e.yaml", cache={**CACHES[name], **sizes})).done()
            made[name] = folder / "run" / "cache"
        return made[name]

    return make


def number(pattern: str, out: str) -> float:
    found = re.search(pattern, out, re.MULTILINE)
    assert found, (pattern, out)
    return float(found[1])


@pytest.mark.parametrize("name", ["varopt", "random", "hidden"])
def test_statistics_are_printed(name: str, caches: Any, distill: Any) -> None:
    out = distill("inspect", caches(name)).done().out
    statistics = gather(CacheReader(caches(name), "train"))
    assert f"of 8 training samples, {statistics.positions:,} positions with loss" in out
    assert number(r"^entropy +([\d.]+) nats$", out) == pytest.approx(statistics.entropy, abs=6e-4)
    assert number(r"^teacher's nll +([\d.]+) nats$", out) == pytest.approx(statistics.surprisal, abs=6e-4)
    for field, size in statistics.bytes_by_field.items():
        printed = number(rf"^  {re.escape(field)} +([\d.]+) bytes a position$", out)
        assert printed == pytest.approx(size / statistics.positions, abs=6e-3)
    assert ("exact mass" in out) == (name == "varopt")
    if statistics.exact_mass is not None:
        assert number(r"^exact mass +([\d.]+)%", out) == pytest.approx(100 * statistics.exact_mass, abs=0.06)
    shares = [float(share) for share in re.findall(r"^ +[\d-]+ entries +([\d.]+)%", out, re.MULTILINE)]
    assert (sum(shares) == pytest.approx(100, abs=0.5)) if name != "hidden" else not shares


def test_an_unfinished_cache_has_no_statistics_yet(caches: Any, distill: Any, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches("varopt"), tmp_path / "cache"))
    lines = (cache / "journal.jsonl").read_text().splitlines(keepends=True)
    (cache / "journal.jsonl").write_text(lines[0])
    out = distill("inspect", cache).done().out
    assert "1 of 2" in out and "entropy" not in out
    distill("inspect", cache, "--sample", 0).refused("not finished")


@pytest.mark.parametrize("name", ["varopt", "hidden"])
def test_a_sample_reads_as_the_text_it_is(name: str, caches: Any, world: Any, distill: Any) -> None:
    from transformers import AutoTokenizer

    reader = CacheReader(caches(name), "train")
    tokenizer = AutoTokenizer.from_pretrained(caches(name) / "tokenizer")
    for index in (0, 7):
        record = reader[index]
        said = distill("inspect", caches(name), "--sample", index).done().out.splitlines()
        documents, lines = said[:-48], said[-48:]
        # Passages of 300 characters: a sample has some of one or more, and says where each begins and comes from.
        starts = np.flatnonzero(record.position_ids_L == 0).tolist()
        assert [int(line.split(":")[0].removeprefix("from token ")) for line in documents] == starts != []
        assert all(re.search(r": document [0-9a-f]{16} of corpus\.jsonl$", line) for line in documents)
        texts = [json.loads(line)["text"] for line in (world.folder / "corpus.jsonl").read_text().splitlines()]
        hashes = {hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts}
        assert {line.split()[4] for line in documents} <= hashes
        tokens = [repr(tokenizer.decode([token])) for token in record.input_ids_L]
        assert len(lines) == len(tokens) == 48
        assert all(line.startswith(token) for line, token in zip(lines, tokens, strict=True))
        told = [place for place, line in enumerate(lines) if re.search(r"  p [\d.]+  H ", line)]
        assert told == (np.flatnonzero(record.loss_mask_L) + 1).tolist()
        for position, place in enumerate(told):
            line = lines[place][len(tokens[place]) :]
            expected = np.exp(record.surprisal_N[position] / -64)
            assert number(r"^ *p ([\d.]+)  H", line) == pytest.approx(expected, abs=6e-5)
    exact = int(record.targets.exact_N[-1]) if name == "varopt" else 0  # type: ignore[union-attr]
    alternatives = re.findall(r"(?:'|\") (\d\.\d\d)\b", lines[told[-1]])
    assert len(alternatives) == min(exact, 4) and alternatives == sorted(alternatives, reverse=True)


@pytest.mark.parametrize("sample", [-1, 8, 10**12])
def test_a_sample_that_is_not_there_is_refused(sample: int, caches: Any, distill: Any) -> None:
    distill("inspect", caches("varopt"), f"--sample={sample}").refused(f"--sample {sample}", "training samples 0 to 7")


def test_a_damaged_tokenizer_is_not_read(caches: Any, distill: Any, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches("varopt"), tmp_path / "cache"))
    (cache / "tokenizer/tokenizer.json").write_text("{}")
    distill("inspect", cache, "--sample", 0).refused("tokenizer.json has changed")


def test_one_question_at_a_time(caches: Any, distill: Any) -> None:
    """Options that would get no answer are refused."""
    for options in (["--sample", "0", "--verify"], ["--sample=0", "--teacher", "x"], ["--verify", "--teacher", "x"]):
        distill("inspect", caches("varopt"), *options).refused("--sample, --teacher", "one at a time")


# Against the teacher.


def error(name: str, caches: Any, world: Any, distill: Any) -> tuple[float, float]:
    """Mean, and root of the mean square, of the KL that is printed, in nats."""
    out = distill("inspect", caches(name), "--teacher", world.content["teacher"]["model"]).done().out
    assert f"{gather(CacheReader(caches(name), 'train')).positions} positions, student = teacher" in out
    return number(r"^KL +([+-][\d.]+) nats on average", out), number(r"^KL, a position +([\d.]+) nats", out)


@pytest.mark.parametrize("name", ["varopt", "random", "warm"])
def test_unbiased_targets_err_to_both_sides(name: str, caches: Any, world: Any, distill: Any) -> None:
    """About 370 positions: the mean is within four standard errors of 0, where the root mean square is far from it."""
    mean, spread = error(name, caches, world, distill)
    positions = gather(CacheReader(caches(name), "train")).positions
    assert spread > 0.05
    assert abs(mean) < 4 * spread / np.sqrt(positions)


@pytest.mark.parametrize("name", ["top_k", "hidden"])
def test_what_holds_all_mass_leaves_no_error_but_rounding(name: str, caches: Any, world: Any, distill: Any) -> None:
    mean, spread = error(name, caches, world, distill)
    assert 0 <= mean < 3e-3 and spread < 0.01


def test_another_teacher_is_refused(caches: Any, distill: Any, make_teacher: Any) -> None:
    other = make_teacher("llama", seed=1)
    outcome = distill("inspect", caches("varopt"), "--teacher", other)
    outcome.refused(other, "is not this cache's teacher (expected sha256", "found")
    distill("inspect", caches("varopt"), "--teacher", "no/such-model").refused("no/such-model")
