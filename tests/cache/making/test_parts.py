"""Parts: they cover a cache once each, and joined they are, byte for byte, the cache that one machine makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.cache.format.folder import Manifest
from distill.cache.format.part import Part, read_part
from distill.cache.format.records import Record
from distill.cache.making.parts import claim_part, merge
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import FolderStorage, open_storage
from distill.errors import UserError


def shard_file(shard: int, held_out: int = 2) -> str:
    """Return the name of a shard of a cache with so many shards of held-out samples."""
    split, number = ("held_out", shard) if shard < held_out else ("train", shard - held_out)
    return f"shards/{split}-{number:06d}.safetensors"


RecordsOf = Callable[[Manifest, int], list[Record]]
MakePart = Callable[..., Path]


def nothing(amount: int) -> None:
    pass


def join(parts: list[Path], to: Path, advance: Callable[[int], None] = nothing) -> None:
    merge([FolderStorage(part) for part in parts], to, advance)


@pytest.fixture
def make_part(tmp_path: Path, make_manifest: Callable[..., Manifest], records_of: RecordsOf) -> MakePart:
    """`make_part("2/3")`: that part of a cache of seven shards; `make_part(None)`: all of it."""

    def make(text: str | None, only: range | None = None, **changes: object) -> Path:
        manifest = make_manifest(**changes)
        folder = tmp_path / (f"part-{text.replace('/', '-of-')}" if text else "whole")
        writer = CacheWriter(folder, manifest)
        part = Part.parse(text) if text else None
        claim_part(folder, part)
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        for shard in only or (part.shards(manifest.shards) if part else range(manifest.shards)):
            writer.write(shard, records_of(manifest, shard))
        return folder

    return make


@given(total=st.integers(1, 300), data=st.data())
def test_parts_cover_all_shards_once_in_order(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    ranges = [Part(number, count).shards(total) for number in range(1, count + 1)]
    assert [shard for part in ranges for shard in part] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(
    "text", ["", "3", "0/8", "9/8", "3/0", "-1/8", "3 / 8", "3/8/1", "a/b", "1e1/20", "03/8", "٣/8"]
)
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"cache.part: .* for example 3/8"):
        Part.parse(text)


def test_more_parts_than_shards_are_refused() -> None:
    with pytest.raises(UserError, match="only 7 shards: give at most 7 parts"):
        Part.parse("1/8").shards(7)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_joined_parts_are_the_whole_cache(
    tmp_path: Path, make_part: MakePart, order: tuple[int, ...], contents: Any
) -> None:
    join([make_part(f"{number}/3") for number in order], tmp_path / "joined")
    assert contents(tmp_path / "joined") == contents(make_part(None))


def test_joining_again_changes_nothing(tmp_path: Path, make_part: MakePart) -> None:
    parts = [make_part("1/2"), make_part("2/2")]
    join(parts, tmp_path / "joined")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "joined").rglob("*.safetensors")}
    join(parts, tmp_path / "joined")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "joined").rglob("*.safetensors")}


def test_stopped_anywhere_it_looks_unfinished_and_can_be_continued(
    tmp_path: Path, make_part: MakePart, contents: Any
) -> None:
    parts, whole = [make_part("1/2"), make_part("2/2")], contents(make_part(None))
    for stop_after in range(6):
        to = tmp_path / f"stopped-{stop_after}"
        copied: list[int] = []

        def stop(amount: int, copied: list[int] = copied, stop_after: int = stop_after) -> None:
            copied.append(amount)
            if len(copied) > stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            join(parts, to, stop)
        with pytest.raises(UserError, match=rf"not finished \({6 - stop_after} of 7 shards"):
            CacheReader(to, "train")
        left: list[int] = []
        join(parts, to, left.append)
        assert len(left) == 6 - stop_after
        assert contents(to) == whole


def test_a_cache_that_was_begun_otherwise_is_completed(
    tmp_path: Path, make_part: MakePart, make_manifest: Callable[..., Manifest], records_of: RecordsOf, contents: Any
) -> None:
    writer = CacheWriter(tmp_path / "begun", make_manifest())
    writer.write(5, records_of(writer.manifest, 5))
    join([make_part("1/2"), make_part("2/2")], tmp_path / "begun")
    assert contents(tmp_path / "begun") == contents(make_part(None))


def test_a_gap_is_named(tmp_path: Path, make_part: MakePart) -> None:
    with pytest.raises(UserError, match=r"gap: none has shards 2-3 of 7"):
        join([make_part("1/3"), make_part("3/3")], tmp_path / "joined")
    with pytest.raises(UserError, match=r"gap: none has shards 3, 6 of 7"):
        unfinished = [make_part("1/2", only=range(0, 3)), make_part("2/2", only=range(4, 6))]
        join(unfinished, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_an_overlap_is_named(tmp_path: Path, make_part: MakePart) -> None:
    parts = [make_part("1/2"), make_part("2/2")]
    for further, message in ((make_part("2/3"), "has shards 2-3: give"), (parts[1], "has shards 3-6: give")):
        with pytest.raises(UserError, match=rf"overlap: more than one {message}"):
            join([*parts, further], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_part_of_another_cache_is_refused_and_the_difference_named(
    tmp_path: Path, make_part: MakePart, make_manifest: Callable[..., Manifest]
) -> None:
    teacher = {**make_manifest().fingerprints, "teacher_weights": "b" * 64}
    with pytest.raises(UserError, match=r"fingerprints.teacher_weights: expected aaaaaaaaaaaa…, found bbbbbbbbbbbb…"):
        join([make_part("1/2"), make_part("2/2", fingerprints=teacher)], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_library_versions_may_differ(tmp_path: Path, make_part: MakePart, contents: Any) -> None:
    parts = [make_part("1/2"), make_part("2/2", made_with={"torch": "3"})]
    join(parts, tmp_path / "joined")
    assert contents(tmp_path / "joined") == contents(make_part(None))


def test_a_changed_shard_is_refused_and_leaves_the_target_unfinished(
    tmp_path: Path, make_part: MakePart, contents: Any
) -> None:
    parts = [make_part("1/2"), make_part("2/2")]
    path = parts[1] / shard_file(5)
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"part-2-of-2: shards/train-000003.safetensors has changed"):
            join(parts, tmp_path / "joined")
        assert not (tmp_path / "joined" / shard_file(5)).exists()
        with pytest.raises(UserError, match="not finished"):
            CacheReader(tmp_path / "joined", "train")
    path.unlink()
    with pytest.raises(UserError, match=r"shards/train-000003.safetensors cannot be read"):
        join(parts, tmp_path / "joined")
    path.write_bytes(content)
    join(parts, tmp_path / "joined")
    assert contents(tmp_path / "joined") == contents(make_part(None))


def test_nothing_of_others_is_written_over(tmp_path: Path, make_part: MakePart, contents: Any) -> None:
    parts = [make_part("1/2"), make_part("2/2")]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    another_cache = make_part(None, seed=1)
    for to, message in (
        (other, "not a cache, and not empty"),
        (parts[0], "is one of the parts"),
        (make_part("1/3"), "holds a part of a cache"),
        (another_cache, "holds another cache .seed: expected 0, found 1"),
    ):
        before = contents(to)
        with pytest.raises(UserError, match=message):
            join(parts, to)
        assert contents(to) == before


def test_a_folder_keeps_the_part_it_was_begun_for(tmp_path: Path, make_part: MakePart) -> None:
    folder = make_part("2/3")
    claim_part(folder, Part(2, 3))
    for other in (Part(1, 3), Part(2, 4), None):
        with pytest.raises(UserError, match=r"holds part 2/3: give --cache.part 2/3"):
            claim_part(folder, other)
    with pytest.raises(UserError, match="begun as a whole, not as part 1/2"):
        claim_part(make_part(None), Part(1, 2))


def test_a_part_is_not_read_as_a_cache(make_part: MakePart) -> None:
    with pytest.raises(UserError, match=r"not finished: it is part 2 of 3: join the parts with `distill merge"):
        CacheReader(make_part("2/3"), "train")
    assert len(CacheReader(make_part("1/1"), "train")) == 20  # one part of one is all of it


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"part": 3}', '{"part": "4/3"}', "\xff"])
def test_a_damaged_part_file_is_refused(make_part: MakePart, text: str) -> None:
    folder = make_part("2/3")
    (folder / "part.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"part.json: damaged"):
        read_part(folder)


def test_a_part_is_recorded_as_written(make_part: MakePart) -> None:
    folder = make_part("2/3")
    assert json.loads((folder / "part.json").read_text()) == {"part": "2/3"}
    assert read_part(folder) == Part(2, 3) == replace(Part(1, 3), number=2)


def test_parts_at_urls_are_joined_as_their_folders_are(
    tmp_path: Path, make_part: MakePart, contents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part's journal begins with shard 2, the third's with 4."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    parts = [make_part(f"{number}/3") for number in (1, 2, 3)]
    join(parts, tmp_path / "of-folders")
    merge([open_storage(part.as_uri()) for part in parts], tmp_path / "of-urls", nothing)
    assert contents(tmp_path / "of-urls") == contents(tmp_path / "of-folders")
