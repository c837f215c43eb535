"""Any bytes in place of a cache's files: one kind of error, with a short message, or the right data; nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from distill.cache.format import head, records
from distill.cache.format.arrays import DamagedRecord, decompress, read_sizes
from distill.cache.format.folder import read_manifest
from distill.cache.format.part import read_part
from distill.cache.format.records import Record
from distill.cache.format.shards import ShardFile, encode
from distill.cache.format.tokenizer_files import tokenizer_problems
from distill.cache.making.repair import repair
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.verify import verify
from distill.errors import UserError
from distill.targets import schemes


def shard_file(shard: int, held_out: int = 2) -> str:
    """Return the name of a shard of a cache with so many shards of held-out samples."""
    split, number = ("held_out", shard) if shard < held_out else ("train", shard - held_out)
    return f"shards/{split}-{number:06d}.safetensors"


quietly = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=quietly)
fuzzed_folder = settings(fuzzed, max_examples=60)
ALL_SCHEMES = [
    schemes.VarOpt(0.05),
    schemes.TopK(6),
    schemes.RandomDraws(8),
    schemes.Hidden(4),
]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, 10**12, 2**60, 10**400, 1e-300, "varopt", "hidden", "../..", "\ud800", "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_manifest: Any, records_of: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("whole") / "cache"
    manifest = make_manifest(samples=7)
    writer = CacheWriter(folder, manifest)
    for shard in writer.missing():
        writer.write(shard, records_of(manifest, shard))
    return folder


@pytest.fixture(scope="module")
def data(whole: Path) -> dict[int, bytes]:
    """Return each sample's record."""
    return dict(read_all(whole))


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with up to four runs of bytes replaced, inserted or taken away; or other bytes altogether."""
    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 12), st.binary(max_size=12))

    def edited(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for start, cut, added in edits:
            result = result[:start] + added + result[start + cut :]
        return result

    return st.lists(edit, min_size=1, max_size=4).map(edited) | st.binary(max_size=400)


def read_all(folder: Path) -> Iterator[tuple[int, bytes]]:
    """Sample and record of all that can be read."""
    for split in ("held_out", "train"):
        try:
            reader = CacheReader(folder, split)
        except UserError as error:
            assert str(error).isprintable()
            continue
        for index in range(len(reader)):
            try:
                sample = reader.manifest.split_range(split)[index]
                yield sample, records.encode(reader[index], reader.scheme, reader.manifest.record_key(sample))
            except UserError as error:
                assert str(error).isprintable()


@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl", shard_file(0), shard_file(1)])
@fuzzed_folder
@given(draw=st.data())
def test_any_bytes_as_a_file(name: str, draw: st.DataObject, cache: Path, whole: Path, data: dict[int, bytes]) -> None:
    original = (whole / name).read_bytes()
    content = draw.draw(mutations(original))
    (cache / name).write_bytes(content)
    assert dict(read_all(cache)).items() <= data.items()
    try:
        assert [problem for problem in verify(cache).problems if "tokenizer" not in problem.file] or content == original
    except UserError as error:
        assert str(error).isprintable()


@fuzzed
@given(content=st.binary(max_size=600), name=st.sampled_from(["SHA256SUMS", "tokenizer.json"]))
def test_any_bytes_as_a_tokenizer(content: bytes, name: str, cache: Path) -> None:
    (cache / "tokenizer").mkdir(exist_ok=True)
    (cache / "tokenizer" / name).write_bytes(content)
    assert tokenizer_problems(cache) or (name, content) == ("SHA256SUMS", b"")


@fuzzed_folder
@given(draw=st.data())
def test_any_manifest_with_the_right_hash(draw: st.DataObject, cache: Path, whole: Path) -> None:
    """Values that a stranger made up: refused, or small enough to live with."""
    content = json.loads((whole / "manifest.json").read_text())
    del content["sha256"]
    for key in draw.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3, unique=True)):
        if isinstance(content[key], dict) and draw.draw(st.booleans()):
            content[key] = {**content[key], draw.draw(st.sampled_from(sorted(content[key]))): draw.draw(anything)}
        else:
            content[key] = draw.draw(anything)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**content, "sha256": digest}, indent=2, sort_keys=True) + "\n"
    (cache / "manifest.json").write_text(text)
    try:
        manifest = read_manifest(cache)
    except UserError as error:
        assert str(error).isprintable()
        return
    assert manifest.shards <= 2**20 and manifest.sequence_length <= 2**24
    list(read_all(cache))


@fuzzed_folder
@given(draw=st.data())
def test_any_journal_line_with_the_right_checksum(
    draw: st.DataObject, cache: Path, whole: Path, data: dict[int, bytes]
) -> None:
    first, *others = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    content = {key: value for key, value in json.loads(first).items() if key != "crc32"}
    content[draw.draw(st.sampled_from([*sorted(content), "more"]))] = draw.draw(anything)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    line = json.dumps({**content, "crc32": f"{crc32:08x}"}, sort_keys=True).encode() + b"\n"
    (cache / "journal.jsonl").write_bytes(line + b"".join(others))
    assert dict(read_all(cache)).items() <= data.items()
    verify(cache)
    try:
        repair(cache)
    except UserError as error:
        assert "another cache" in str(error)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
@fuzzed
@given(draw=st.data(), seed=st.integers(0, 5))
def test_a_forged_record_with_the_right_checksum(scheme: Any, draw: st.DataObject, seed: int, make_record: Any) -> None:
    """It may hold other numbers, but is a record or damaged: no crash, and no more memory than a record takes."""
    record: Record = make_record(seed, scheme)
    body = draw.draw(mutations(records.encode(record, scheme)[4:]))
    forged = struct.pack("<I", zlib.crc32(body, 5)) + body
    try:
        read = records.decode(forged, len(record.input_ids_L), scheme, 5)
    except DamagedRecord:
        return
    assert len(read.input_ids_L) == len(record.input_ids_L) == len(read.position_ids_L) == len(read.loss_mask_L)


@fuzzed
@given(draw=st.data(), samples=st.integers(1, 4))
def test_any_bytes_as_a_shard(draw: st.DataObject, samples: int, tmp_path: Path) -> None:
    written = [b"record %d" % row * (row + 1) for row in range(samples)]
    path = tmp_path / "shard"
    path.write_bytes(draw.draw(mutations(encode(written, 3)) | st.just(encode(written, 3))))
    for row in range(samples):
        try:
            with ShardFile(path, samples) as file:
                assert len(file.record(row)) <= path.stat().st_size
        except DamagedRecord:
            continue


@fuzzed
@given(content=st.binary(max_size=200), count=st.integers(0, 2000), dtype=st.sampled_from(["u16", "u32", "i32"]))
def test_any_bytes_as_a_field(content: bytes, count: int, dtype: str) -> None:
    with contextlib.suppress(DamagedRecord):
        assert len(decompress(content, count, dtype)) == count


@fuzzed
@given(content=st.binary(max_size=80), count=st.integers(0, 20))
def test_any_bytes_as_sizes(content: bytes, count: int) -> None:
    with contextlib.suppress(DamagedRecord):
        sizes, end = read_sizes(content, 0, count)
        assert len(sizes) == count and end <= len(content) and all(0 <= size < 2**63 for size in sizes)


def test_no_header_can_claim_memory(cache: Path, data: dict[int, bytes]) -> None:
    """Absurd sizes at every place of a shard's header and offsets: some sample of it is refused, none is wrong."""
    path = cache / shard_file(0)
    original = path.read_bytes()
    for place in range(0, 8 + int.from_bytes(original[:8], "little") + 40, 8):
        for size in (2**60, 2**64 - 1, 100 * 2**20, 513):
            path.write_bytes(original[:place] + struct.pack("<Q", size) + original[place + 8 :])
            read = dict(read_all(cache))
            assert read.items() < data.items()


HUGE = ["1" * 300, "1" * 5000, "-" + "9" * 400, "1e999", "NaN", "[" * 20_000 + "]" * 20_000, '"\\ud800"', str(2**64)]


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_no_value_in_a_json_file_of_a_cache_is_more_than_damage(cache: Path, value: str) -> None:
    """Numbers of thousands of digits, nesting, lone surrogates: in the manifest, the journal and a part's file."""
    line = (cache / "journal.jsonl").read_text().splitlines(keepends=True)
    changed = line[0].replace(f'"positions": {json.loads(line[0])["positions"]}', f'"positions": {value}')
    assert changed != line[0]
    (cache / "journal.jsonl").write_text(changed + "".join(line[1:]), encoding="utf-8")
    problems = {problem.file for problem in verify(cache).problems}
    assert "journal.jsonl, line 1" in problems
    with pytest.raises(UserError, match=r"journal.jsonl, line 1: damaged"):
        CacheReader(cache, "train")
    (cache / "part.json").write_text(f'{{"part": {value}}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"part.json: damaged"):
        read_part(cache)
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace('"seed": 0', f'"seed": {value}'), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest.json: (not readable|damaged)"):
        read_manifest(cache)


def test_a_journal_of_any_length_is_read_in_little_memory(cache: Path) -> None:
    """A line of 50 MB and a million short ones: each is damage, and what is whole before them counts."""
    whole = (cache / "journal.jsonl").read_bytes()
    for rest in (b"x" * 50_000_000, b"{}\n" * 1_000_000, b"x" * 50_000_000 + b"\n" + whole[: whole.index(b"\n") + 1]):
        (cache / "journal.jsonl").write_bytes(whole + rest)
        tracemalloc.start()
        report = verify(cache)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**25  # of which the manifest may take half
        assert any(problem.file.startswith("journal.jsonl") for problem in report.problems)
        assert (report.bad, report.to_do) == (0, 0)


def test_a_head_with_the_right_hash_and_odd_numbers_is_damage(tmp_path: Path) -> None:
    """The hash is the file's own: whoever writes the file can make it fit."""
    tensors = {"weight": torch.ones(3, 2)}
    for scale in ("1e999", "1" * 400, "NaN", "[]", "["):
        text = f'{{"scale": {scale}, "soft_cap": null}}'
        metadata = {"head": f"{head._sha256(tensors, text)} {text}"}
        (tmp_path / "head.safetensors").write_bytes(save(tensors, metadata=metadata))
        with pytest.raises(UserError, match="has changed"):
            head.load_head(tmp_path)
