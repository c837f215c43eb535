"""Kills real `cache-teacher` processes at random instants until each cache is done, and compares every byte.

    python tests/benchmarks/kill_storm.py --kills 500

Every other cache is made by a streamed teacher, killed while it quantises its copy and while it streams. The processes
are forked from one that has imported everything, so that hundreds of them fit into minutes; what runs in them is the
whole command. Prints a tally of where the kills hit; exit status 1 when a cache came out different.
"""

from __future__ import annotations

import collections
import json
import random
import signal
import time
from pathlib import Path

import forked
from forked import Children, contents, distill_here, exited, send, write_experiment

HEAD_START = 0.02
"""Seconds before the first file, from which on kills are thrown."""


class Storm:
    """A tiny teacher and a corpus, a cache that nobody disturbed, and any number of caches that were."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.file = write_experiment(
            folder,
            cache={"batch_size": 3, "shard_samples": 4, "held_out_samples": 6},
            teacher={"quantization": "nf4"},
        )
        self.hits: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.children = Children(folder, self.problems.append)
        # Imports what is imported late, and fills the data set's cache.
        for name in ("warm", "warm-streamed"):
            assert distill_here(*self._command(folder / name)) == 0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that has just begun
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        child, cache = self._start("undisturbed")
        self.before, self.duration = self._time(child, cache)
        self.undisturbed = contents(cache)
        self.copy = contents(copy_of(folder / "warm-streamed"))

    def rage(self, kills: int) -> int:
        started, caches, thrown = time.monotonic(), 0, 0
        while thrown < kills:
            name = f"cache{caches}" + ("-streamed" if caches % 2 else "")
            thrown += self._disturb(name, kills - thrown)
            if contents(self.folder / name) != self.undisturbed:
                self.problems.append(f"{name} is not the undisturbed cache")
            if caches % 2 and contents(copy_of(self.folder / name)) != self.copy:
                self.problems.append(f"{name}: its quantised copy is not the undisturbed one")
            caches += 1
        for where, count in sorted(self.hits.items()):
            print(f"{count:5}  {where}")
        print(
            f"{thrown:5}  kills, {caches} caches of {len(self.undisturbed)} files, {time.monotonic() - started:.0f} s"
        )
        print(*self.problems, sep="\n", end="\n" if self.problems else "")
        print(f"{caches - len(self.problems)} of {caches} caches are byte for byte the undisturbed one")
        return 1 if self.problems else 0

    def _disturb(self, name: str, most: int) -> int:
        """Kill until the cache is done; the number of kills."""
        kills = 0
        while True:
            child, cache = self._start(name)
            hit = kills < min(most, 6) and self._kill(child, cache)
            status = self.children.wait(child)
            if status not in (0, 130, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGINT):
                self.problems.append(f"{name}: exit status {status}: {self.children.said(name)[-500:]}")
                return kills
            kills += hit
            if status == 0:
                return kills

    def _kill(self, child: int, cache: Path) -> bool:
        """Wait for a random instant and kill; False: the process was done before."""
        kind = self.random.choice(["clock", "begin", "file"])
        copy = copy_of(cache)
        if "streamed" in cache.name and not (copy / "quantized.json").exists():
            files = self.random.randrange(6)
            while not exited(child) and len(list(copy.glob("*.safetensors*"))) < files:
                pass
            time.sleep(self.random.uniform(0, 0.004))
            kind = "copy"
        if kind == "clock":
            early = self.random.random() < 0.15
            after = 0.0 if early else self.before - HEAD_START
            time.sleep(self.random.uniform(after, self.before if early else self.duration))
        elif kind != "copy":
            journal, size = cache / "journal.jsonl", 0
            shards = self.random.randrange(12) if kind == "file" else 0
            while not exited(child) and not (cache.exists() if shards == 0 else size >= shards * 250):
                size = journal.stat().st_size if journal.exists() else 0
            time.sleep(self.random.uniform(0, 0.02 if kind == "begin" else 0.008))
        if exited(child):
            if kind == "clock":  # the machine is faster than it was
                self.duration = max(self.duration * 0.9, self.before * 1.2)
            return False
        signum = self.random.choice([signal.SIGKILL] * 8 + [signal.SIGINT, signal.SIGTERM])
        send(signum, child)
        self.hits[f"{signum.name:8} {where(cache)}"] += 1
        return True

    def _start(self, name: str) -> tuple[int, Path]:
        cache = self.folder / name
        return self.children.start(name, *self._command(cache)), cache

    def _command(self, cache: Path) -> list[str]:
        command = ["cache-teacher", str(self.file), "--cache.dir", str(cache)]
        if "streamed" not in cache.name:
            return command
        options = json.dumps({"quantized_copy": str(copy_of(cache))})
        return [*command, "--teacher.class_path", "streamed", "--teacher.options", options]

    def _time(self, child: int, cache: Path) -> tuple[float, float]:
        """Seconds until the cache's folder is there, and until the end."""
        started = time.monotonic()
        while not cache.exists() and not exited(child):
            time.sleep(0.0005)
        before = time.monotonic() - started
        assert self.children.wait(child) == 0, self.children.said(cache.name)
        return before, time.monotonic() - started


def copy_of(cache: Path) -> Path:
    """Return the folder of the quantised copy that a streamed teacher reads."""
    return cache.with_name(f"{cache.name}-copy")


def where(cache: Path) -> str:
    """Return the work that a kill interrupted, as far as the files tell."""
    if (copy_of(cache) / "quantized.begun.json").exists():
        return "while quantising"
    names = {str(path.relative_to(cache)) for path in cache.rglob("*")} if cache.exists() else set()
    lines = (cache / "journal.jsonl").read_bytes() if "journal.jsonl" in names else b""
    shards = sum(name.endswith(".safetensors") for name in names)
    half = sorted(name for name in names if name.endswith(".tmp"))
    if half:
        return "with half of " + ("a shard" if half[0].startswith("shards") else half[0])
    if not names:
        return "before the folder"
    if "manifest.json" not in names or "tokenizer" not in names:
        return "before the tokenizer"
    if not lines.endswith(b"\n") and lines:
        return "with a torn journal line"
    done = lines.count(b"\n")
    if shards > done:
        return "between a shard and its journal line"
    return "before the first shard" if done == 0 else "between shards, or with one in memory"


if __name__ == "__main__":
    forked.main(__doc__, 500, Storm)
