"""Statistics: the numbers that a direct computation over the same records gives, and the lines of one sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record, encode
from distill.cache.format.token_order import FINGERPRINT, TokenOrder, save_order
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.statistics import alternatives, gather, histogram
from distill.targets import schemes

STEP = 1 / 64
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "varopt": ("varopt", {"threshold": 0.05}),
    "top_k": ("top_k", {"entries": 7}),
    "random": ("random", {"entries": 9}),
    "hidden": ("hidden", {"size": 5}),
}


def write(folder: Path, manifest: Manifest, records_of: Callable[[Manifest, int], list[Record]], order: Any) -> None:
    writer = CacheWriter(folder, manifest)
    save_order(folder, order)
    for shard in range(manifest.shards):
        writer.write(shard, records_of(manifest, shard))


@pytest.fixture(scope="module", params=SCHEMES.keys())
def reader(
    request: Any,
    tmp_path_factory: pytest.TempPathFactory,
    make_manifest: Callable[..., Manifest],
    records_of: Callable[[Manifest, int], list[Record]],
) -> CacheReader:
    """20 training samples of 24 tokens of any numbers, their tokens out of order."""
    name, parameters = SCHEMES[request.param]
    order = TokenOrder(np.random.default_rng(0).permutation(1009).astype(np.uint32))
    fingerprints = {**make_manifest().fingerprints, FINGERPRINT: order.fingerprint}
    manifest = make_manifest(scheme=name, scheme_parameters=parameters, fingerprints=fingerprints)
    folder = tmp_path_factory.mktemp("cache") / "cache"
    write(folder, manifest, records_of, order)
    return CacheReader(folder, "train")


def sizes_header(packed: bytes, fields: int) -> int:
    """Bytes of the checksum and of the sizes, each of which ends with the first byte below 128."""
    ends = [place for place, byte in enumerate(packed) if place >= 4 and byte < 0x80]
    return ends[fields + 1] + 1


def test_they_equal_a_direct_computation(reader: CacheReader) -> None:
    found, records = gather(reader), [reader[index] for index in range(20)]
    positions = sum(int(record.loss_mask_L.sum()) for record in records)
    assert (found.samples, found.tokens, found.positions) == (20, 20 * 24, positions)
    entropy, surprisal = (
        np.concatenate([getattr(record, name) for record in records]).astype(float) * STEP
        for name in ("entropy_N", "surprisal_N")
    )
    assert found.entropy == pytest.approx(entropy.mean()) and found.surprisal == pytest.approx(surprisal.mean())
    if reader.manifest.scheme == "hidden":
        assert found.entries == {} and found.exact_mass is None
        return
    counts = Counter(int(count) for record in records for count in record.targets.counts_N)  # type: ignore[union-attr]
    assert found.entries == counts and list(found.entries) == sorted(found.entries)
    if isinstance(reader.scheme, schemes.RandomDraws):
        assert found.exact_mass is None  # draws keep no probability exactly
        return
    mass = 0.0
    for record in records:
        targets = reader.collate([record]).targets
        for row in range(len(targets.exact_N)):  # type: ignore[union-attr]
            here: Any = targets[row : row + 1]
            mass += float(here.weights_T[: int(here.exact_N)].double().sum())
    assert found.exact_mass == pytest.approx(mass / positions, rel=1e-5)


def test_fields_and_headers_are_all_there_is(reader: CacheReader) -> None:
    found = gather(reader)
    packed = [encode(reader.order.ranked(reader[index]), reader.scheme) for index in range(20)]
    headers = sum(sizes_header(data, len(found.bytes_by_field)) for data in packed)
    assert sum(found.bytes_by_field.values()) + headers == sum(map(len, packed))
    shards = reader.storage.folder / "shards"
    assert sum(map(len, packed)) < sum(path.stat().st_size for path in shards.iterdir())


def test_of_many_samples_some_are_looked_at_from_the_first_to_the_last(reader: CacheReader) -> None:
    looked_at: list[int] = []

    class Watched:
        scheme, order = reader.scheme, reader.order

        def __len__(self) -> int:
            return len(reader)

        def __getitem__(self, index: int) -> Record:
            looked_at.append(index)
            return reader[index]

    found = gather(Watched(), most_samples=6)  # type: ignore[arg-type]
    assert looked_at == [0, 4, 8, 11, 15, 19] and found.samples == 6
    assert gather(Watched(), most_samples=100).samples == 20  # type: ignore[arg-type]


def test_no_position_at_all() -> None:
    """An empty split: nothing to divide by."""
    empty: Any = SimpleNamespace(scheme=schemes.VarOpt(0.1), order=TokenOrder.by_id(10), __len__=lambda: 0)

    class Empty(SimpleNamespace):
        def __len__(self) -> int:
            return 0

    found = gather(Empty(**vars(empty)))  # type: ignore[arg-type]
    assert (found.samples, found.positions, found.entropy, found.entries) == (0, 0, 0.0, {})


@pytest.mark.parametrize(
    "entries", [{3: 5}, {1: 1, 2: 3}, dict.fromkeys(range(5, 60), 2), {1: 1, 10**4: 1}, {0: 2, 8: 6}]
)
def test_a_histogram_has_every_position_once(entries: dict[int, int]) -> None:
    rows = histogram(entries)
    assert 1 <= len(rows) <= 8
    assert sum(share for _, share in rows) == pytest.approx(1)
    bounds = [[int(bound) for bound in label.split("-")] for label, _ in rows]
    assert bounds[0][0] == min(entries) and bounds[-1][-1] == max(entries)
    assert all(one[-1] + 1 == other[0] for one, other in pairwise(bounds))
    for (first, *last), (_, share) in zip(bounds, rows, strict=True):
        inside = sum(count for number, count in entries.items() if first <= number <= (last or [first])[0])
        assert share == pytest.approx(inside / sum(entries.values()))
    assert histogram({}) == []


class Numbered:
    """A tokenizer whose tokens read as their numbers."""

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


def test_a_sample_is_shown_token_by_token(reader: CacheReader) -> None:
    """A line a token; what the teacher gave it comes from the position before, where that one carries loss."""
    shown = 0
    for index in range(20):
        record = reader[index]
        lines = alternatives(reader, index, Numbered())
        assert [line.split()[0] for line in lines] == [f"'{token}'" for token in record.input_ids_L]
        targets = reader.collate([record]).targets
        position = -1
        for place, line in enumerate(lines):
            # A document's first token is nobody's next one. (These records have loss there all the same.)
            has_loss = place > 0 and bool(record.loss_mask_L[place - 1])
            position += has_loss
            numbers = re.search(r"  p ([\d.]+)  H +([\d.]+)", line)
            assert bool(numbers) == (has_loss and record.position_ids_L[place] != 0), line
            if not numbers:
                continue
            shown += 1
            assert float(numbers[1]) == pytest.approx(np.exp(-STEP * record.surprisal_N[position]), abs=6e-5)
            assert float(numbers[2]) == pytest.approx(record.entropy_N[position] * STEP, abs=6e-3)
            others = re.findall(r"'(\d+)' (-?[\d.]+)", line[numbers.end() :])
            if reader.manifest.scheme == "hidden":
                assert not others
                continue
            here: Any = targets[position : position + 1]
            shown_N = min(int(here.exact_N), 4)
            assert [int(token) for token, _ in others] == here.ids_T[:shown_N].tolist()
            weights = here.weights_T[:shown_N].tolist()
            assert [float(weight) for _, weight in others] == pytest.approx(weights, abs=6e-3)
    assert shown > 50
