"""The same cache whatever batch size, shard size, order of work, restarts and number of processes made it.

The teacher here gives each position logits that depend on its token and position id alone, to the last bit: what
remains is what this program does. (A real teacher's logits differ in their low bits between shapes of batches.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.cache.format.folder import Manifest, read_journal
from distill.cache.format.in_flight import side_file
from distill.cache.format.part import Part
from distill.cache.making.parts import claim_part, merge
from distill.cache.making.predict import TeacherModule
from distill.cache.making.processes import ShardShares, make_trainer, predict
from distill.cache.making.repair import repair
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import FolderStorage
from distill.errors import UserError
from distill.models.language_model import Head
from distill.system.progress import Progress

SAMPLES, LENGTH, VOCABULARY = 23, 24, 1009


class ExactTeacher(nn.Module):
    """Hidden state = row of a table for the token + row of a table for the position id."""

    def __init__(
        self,
        seconds: float = 0.0,
        fails_in_process: int | None = None,
        room: int = SAMPLES,
        seen: list[int] | None = None,
    ) -> None:
        """Set up the table; `seen` gets the size of each batch, and one over `room` finds no memory."""
        super().__init__()
        self.room, self.seen = room, [] if seen is None else seen
        generator = torch.Generator().manual_seed(3)
        self.tokens_VD = nn.Parameter(torch.randn(VOCABULARY, 16, generator=generator))
        self.positions_LD = nn.Parameter(torch.randn(LENGTH, 16, generator=generator))
        self.output_VD = nn.Parameter(torch.randn(VOCABULARY + 7, 16, generator=generator))
        self.seconds, self.fails = seconds, os.environ.get("LOCAL_RANK", "0") == str(fails_in_process)

    @property
    def head(self) -> Head:
        return Head(self.output_VD)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.seen.append(len(input_ids_BL))
        if len(input_ids_BL) > self.room:
            raise torch.OutOfMemoryError("no room")
        if self.fails:
            raise RuntimeError("out of teachers")
        return self.tokens_VD[input_ids_BL] + self.positions_LD[position_ids_BL]


class RandomSamples(Dataset[dict[str, Tensor]]):
    """Samples of two documents with holes in the loss mask; each a function of its number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        first = int(torch.randint(1, LENGTH, (), generator=generator))
        mask_L = torch.rand(LENGTH, generator=generator) < 0.8
        mask_L[-1] = False
        return {
            "input_ids": torch.randint(VOCABULARY, (LENGTH,), generator=generator),
            "position_ids": torch.cat([torch.arange(first), torch.arange(LENGTH - first)]),
            "loss_mask": mask_L,
        }


def make_cache(
    folder: Path, manifest: Manifest, batch_size: int, shards: range | None = None, devices: int = 1, **teacher: Any
) -> None:
    """As the recipe does it, without a corpus."""
    trainer = make_trainer("cpu", devices)
    if trainer.is_global_zero:
        CacheWriter(folder, manifest)
    scheme = manifest.make_scheme()
    module = TeacherModule(ExactTeacher(**teacher), VOCABULARY, scheme, seed=manifest.seed, chunk_size=7)
    only = range(manifest.shards) if shards is None else shards

    def open_writer() -> CacheWriter:
        return CacheWriter(folder, manifest, batch_size=batch_size)

    predict(trainer, module, ShardShares(RandomSamples(), open_writer, only, Progress("", 0, "")))


@pytest.fixture
def manifest_of(make_manifest: Callable[..., Manifest]) -> Callable[..., Manifest]:
    return lambda **changes: make_manifest(SAMPLES, **changes)


def xor(content: bytes, flips: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(content, flips.ljust(len(content), b"\0"), strict=True))


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """All numbers of all samples."""
    return [
        {name: value for name, value in {**vars(record), **vars(record.targets)}.items() if name != "targets"}
        for split in ("held_out", "train")
        for reader in [CacheReader(folder, split)]
        for record in (reader[index] for index in range(len(reader)))
    ]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(np.array_equal(one, other))


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


SCHEMES = {
    "varopt": {"threshold": 0.02},
    "random": {"entries": 20},
    "top_k": {"entries": 12},
    "hidden": {"size": 16},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_sizes_make_the_same_samples(tmp_path: Path, manifest_of: Any, scheme: str) -> None:
    """Whole numbers have no rounding. The batch size is written down with each shard."""
    manifest = manifest_of(scheme=scheme, scheme_parameters=SCHEMES[scheme])
    made = []
    for batch_size in (1, 3, 8):
        make_cache(tmp_path / str(batch_size), manifest, batch_size)
        made.append(samples_of(tmp_path / str(batch_size)))
        assert {entry.batch_size for entry in read_journal(tmp_path / str(batch_size)).values()} == {batch_size}
    assert equal(made[0], made[1]) and equal(made[0], made[2])


@pytest.mark.filterwarnings("ignore")
def test_a_shard_that_is_made_again_has_its_batch_size_again(tmp_path: Path, manifest_of: Any, contents: Any) -> None:
    """Whoever took it away, a repair or a user; shards that were never there get the new one."""
    manifest, folder = manifest_of(), tmp_path / "cache"
    make_cache(folder, manifest, 3)
    before = contents(folder)
    for number, file in enumerate((manifest.shard_file(1), manifest.shard_file(3))):
        path = folder / file
        if number:
            path.write_bytes(b"damaged")
            assert f"{file} has changed: dropped" in repair(folder)
        else:
            path.unlink()
        assert not path.exists()
        make_cache(folder, manifest, 8)
        assert contents(folder) == before
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    (folder / manifest.shard_file(manifest.shards - 1)).unlink()
    make_cache(folder, manifest, 8)
    sizes = [entry.batch_size for _, entry in sorted(read_journal(folder).items())]
    assert sizes == [3] * (manifest.shards - 1) + [8]


@pytest.mark.filterwarnings("ignore")
def test_full_shards_of_a_smaller_cache_are_those_of_a_larger_one(tmp_path: Path, make_manifest: Any) -> None:
    """The number of samples that are asked for changes nothing of what the source determines."""
    smaller, larger = make_manifest(SAMPLES - 6), make_manifest(SAMPLES)
    for name, manifest in (("smaller", smaller), ("larger", larger)):
        make_cache(tmp_path / name, manifest, 3)
    assert smaller.identity == larger.identity
    lines = {name: (tmp_path / name / "journal.jsonl").read_bytes().splitlines() for name in ("smaller", "larger")}
    full = [shard for shard in range(smaller.shards) if smaller.shard_range(shard) == larger.shard_range(shard)]
    assert len(full) >= 3
    for shard in full:
        file = smaller.shard_file(shard)
        assert (tmp_path / "smaller" / file).read_bytes() == (tmp_path / "larger" / file).read_bytes()
        assert lines["smaller"][shard] == lines["larger"][shard]


@pytest.mark.filterwarnings("ignore")
def test_shard_sizes_hold_the_same_samples(tmp_path: Path, manifest_of: Any) -> None:
    for shard_samples in (1, 4, 7, 64):
        make_cache(tmp_path / str(shard_samples), manifest_of(shard_samples=shard_samples), batch_size=3)
    expected = samples_of(tmp_path / "4")
    assert len(expected) == SAMPLES
    assert all(equal(samples_of(tmp_path / str(shard_samples)), expected) for shard_samples in (1, 7, 64))


@pytest.mark.filterwarnings("ignore")
def test_another_seed_makes_another_cache(tmp_path: Path, manifest_of: Any) -> None:
    """The tests above would find this difference if the numbers depended on anything but seed and content."""
    for seed in (0, 1):
        make_cache(tmp_path / str(seed), manifest_of(seed=seed), batch_size=3)
    zero, one = samples_of(tmp_path / "0"), samples_of(tmp_path / "1")
    assert not any(torch.equal(a["ids_T"], b["ids_T"]) for a, b in zip(zero, one, strict=True))
    assert all(np.array_equal(a["input_ids_L"], b["input_ids_L"]) for a, b in zip(zero, one, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_order_of_work_and_restarts_make_the_same_bytes(tmp_path: Path, manifest_of: Any, contents: Any) -> None:
    manifest = manifest_of()
    make_cache(tmp_path / "straight", manifest, batch_size=3)
    for shard in (4, 1, 6, 0, 2, 3, 5):
        make_cache(tmp_path / "jumping", manifest, 3, range(shard, shard + 1))
    assert contents(tmp_path / "jumping") == contents(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore")
def test_parts_make_the_same_bytes(tmp_path: Path, manifest_of: Any, contents: Any) -> None:
    manifest = manifest_of()
    make_cache(tmp_path / "whole", manifest, batch_size=3)
    parts = [(Part(number, 3), tmp_path / f"part{number}") for number in (1, 2, 3)]
    for part, folder in parts:
        CacheWriter(folder, manifest)
        claim_part(folder, part)
        make_cache(folder, manifest, 3, part.shards(manifest.shards))
    merge([FolderStorage(folder) for _, folder in parts], tmp_path / "joined", lambda _: None)
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_finished_batches_of_a_shard_in_flight_are_not_computed_again(
    tmp_path: Path, manifest_of: Any, contents: Any, signum: signal.Signals
) -> None:
    """The batch size of the second start does not matter to a shard that was begun."""
    manifest, folder, seen = manifest_of(shard_samples=64), tmp_path / "cache", []
    process = start(tmp_path, folder, manifest, batch_size=2, seconds=0.3)
    side, deadline = side_file(folder, manifest, manifest.shards - 1), time.monotonic() + 120
    while not (side.exists() and side.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    output = end(process)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 130), output
    shard = manifest.shard_range(manifest.shards - 1)
    done = CacheWriter(folder, manifest).begun(manifest.shards - 1)
    assert 0 < done < len(shard)
    make_cache(folder, manifest, batch_size=5, seen=seen)
    assert sum(seen) == len(shard) - done and set(seen) <= {1, 2}
    make_cache(tmp_path / "straight", manifest, batch_size=2)
    assert contents(folder) == contents(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_side_file_counts_up_to_the_damage(tmp_path: Path, manifest_of: Any, contents: Any) -> None:
    """It may be cut anywhere, a bit of it may have flipped, or it may be another shard's."""
    manifest = manifest_of(shard_samples=64)
    make_cache(tmp_path / "straight", manifest, batch_size=2)
    last, first, undisturbed = manifest.shards - 1, 0, contents(tmp_path / "straight")

    def begun(folder: Path, shard: int, change: Callable[[bytes], bytes]) -> int:
        """Make three batches of the last shard, change the side file, and finish the cache."""
        writer, made = CacheWriter(folder, manifest), CacheReader(tmp_path / "straight", "train")
        for start in (0, 2, 4):
            writer.add(last, [made[start], made[start + 1]], 2)
        whole = side_file(folder, manifest, last)
        content = whole.read_bytes()
        whole.unlink()
        side_file(folder, manifest, shard).write_bytes(change(content))
        found = CacheWriter(folder, manifest).begun(shard)
        make_cache(folder, manifest, batch_size=2)
        assert contents(folder) == undisturbed
        return found

    assert begun(tmp_path / "whole", last, lambda content: content) == 6
    assert begun(tmp_path / "other", first, lambda content: content) == 0
    assert begun(tmp_path / "cut", last, lambda content: content[:-1]) == 4
    assert begun(tmp_path / "short", last, lambda content: content[:7]) == 0
    assert (
        begun(tmp_path / "flipped", last, lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:]) == 0
    )


@pytest.mark.filterwarnings("ignore")
def test_out_of_memory_halves_the_batches_and_goes_on(
    tmp_path: Path, manifest_of: Any, contents: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache is the one of the smaller batch size, which is written down."""
    manifest, seen = manifest_of(), []
    make_cache(tmp_path / "halved", manifest, batch_size=4, room=2, seen=seen)
    make_cache(tmp_path / "small", manifest, batch_size=2)
    assert contents(tmp_path / "halved") == contents(tmp_path / "small")
    assert seen.count(4) == 1
    said = capsys.readouterr().out
    assert said.count("out of memory with 4 samples a forward pass; from here on 2") == 1
    with pytest.raises(UserError, match="out of memory with 1 sample of 24 tokens"):
        make_cache(tmp_path / "none", manifest, batch_size=4, room=0)


# Several processes. Lightning starts them by running the script again.

SCRIPT = """
import importlib.util, json, signal, sys
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
spec = importlib.util.spec_from_file_location("determinism", sys.argv[1])
determinism = importlib.util.module_from_spec(spec)
sys.modules["determinism"] = determinism
spec.loader.exec_module(determinism)
from pathlib import Path
from distill.system import interrupt
from distill.cache.format.folder import Manifest
content = json.loads(sys.argv[2])
interrupt.install()
try:
    with interrupt.deferred():
        folder, manifest = Path(content.pop("folder")), Manifest(**content.pop("manifest"))
        determinism.make_cache(folder, manifest, **content)
except interrupt.Interrupted:
    sys.exit(130)
print("made", flush=True)
"""


def start(tmp_path: Path, folder: Path, manifest: Manifest, **options: Any) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    content = json.dumps({"folder": str(folder), "manifest": asdict(manifest), **options})
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [sys.executable, script, __file__, content],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )


def end(process: subprocess.Popen[str]) -> str:
    """All its output. The pipe ends when the last process that holds it has ended: none is left behind."""
    try:
        return process.communicate(timeout=180)[0]
    finally:
        process.kill()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("devices", "shard_samples"), [(2, 64), (3, 2)])
def test_processes_make_the_same_bytes(
    tmp_path: Path, manifest_of: Any, devices: int, shard_samples: int, contents: Any
) -> None:
    """One shard for two processes, of which one has nothing to do, and twelve for three."""
    manifest = manifest_of(shard_samples=shard_samples)
    make_cache(tmp_path / "one", manifest, batch_size=3)
    process = start(tmp_path, tmp_path / "several", manifest, batch_size=3, devices=devices)
    output = end(process)
    assert process.returncode == 0, output
    assert output.count("made") == 1  # the others end where they have done their share
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


def has_lines(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_the_first_process_stops_all_and_they_continue(tmp_path: Path, manifest_of: Any, contents: Any) -> None:
    manifest, folder = manifest_of(shard_samples=1), tmp_path / "several"
    process = start(tmp_path, folder, manifest, batch_size=1, devices=2, seconds=0.3)
    deadline = time.monotonic() + 120
    while not has_lines(folder / "journal.jsonl") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = end(process)
    assert process.returncode == 130, output
    assert 0 < len(read_journal(folder)) < SAMPLES // 2  # the other did not finish its half either
    make_cache(folder, manifest, batch_size=1)
    make_cache(tmp_path / "one", manifest, batch_size=1)
    assert contents(folder) == contents(tmp_path / "one")


def test_a_process_that_fails_fails_the_run(tmp_path: Path, manifest_of: Any) -> None:
    process = start(tmp_path, tmp_path / "several", manifest_of(), batch_size=1, devices=2, fails_in_process=1)
    output = end(process)
    assert process.returncode != 0
    assert "out of teachers" in output and "made" not in output
