"""Kills real `cache-teacher` processes at random instants until each cache is done, and compares every byte.

    python tests/benchmarks/kill_storm.py --kills 500

The processes are forked from one that has imported everything, so that hundreds of them fit into minutes; what runs in
them is the whole command. Prints a tally of where the kills hit; exit status 1 when a cache came out different.
"""

from __future__ import annotations

import os

# Before anything heavy is imported: a process with threads cannot be forked safely.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import collections
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

SIGNALS = {signal.SIGINT, signal.SIGTERM}
PATIENCE = 60.0
"""Seconds after which a process counts as hanging."""
HEAD_START = 0.02
"""Seconds before the first file, from which on kills are thrown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(Storm(Path(folder), options.seed).rage(options.kills))


class Storm:
    """A tiny teacher and a corpus, a cache that nobody disturbed, and any number of caches that were."""

    def __init__(self, folder: Path, seed: int) -> None:
        from conftest import passages, save_teacher

        self.folder, self.random = folder, random.Random(seed)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        texts = passages(12)
        (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        content = {
            "corpus": {"path": str(folder / "corpus.jsonl"), "sequence_length": 16, "held_out": 0.2},
            "teacher": {"model": str(save_teacher(folder / "teacher", texts)), "quantization": "none"},
            "cache": {"batch_size": 3, "shard_samples": 4, "held_out_samples": 6},
            "run_dir": str(folder / "run"),
        }
        (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
        self.hits: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self._run_here(folder / "warm")  # imports what is imported late, and fills the data set's cache
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that has just begun
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        child, cache = self._start("undisturbed")
        self.before, self.duration = self._time(child, cache)
        self.undisturbed = contents(cache)

    def rage(self, kills: int) -> int:
        started, caches, thrown = time.monotonic(), 0, 0
        while thrown < kills:
            name = f"cache{caches}"
            thrown += self._disturb(name, kills - thrown)
            if contents(self.folder / name) != self.undisturbed:
                self.problems.append(f"{name} is not the undisturbed cache")
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
            hit = kills < min(most, 12) and self._kill(child, cache)
            status = self._wait(child)
            if status not in (0, 130, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGINT):
                self.problems.append(f"{name}: exit status {status}: {self._said(name)}")
                return kills
            kills += hit
            if status == 0:
                return kills

    def _kill(self, child: int, cache: Path) -> bool:
        """Wait for a random instant and kill; False: the process was done before."""
        kind = self.random.choice(["clock", "begin", "file"])
        if kind == "clock":
            early = self.random.random() < 0.15
            after = 0.0 if early else self.before - HEAD_START
            time.sleep(self.random.uniform(after, self.before if early else self.duration))
        else:
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
        os.kill(child, signum)
        if signum == signal.SIGKILL:
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        self.hits[f"{signum.name:8} {where(cache)}"] += 1
        return True

    def _start(self, name: str) -> tuple[int, Path]:
        cache = self.folder / name
        # A signal between the fork and `try` would send the child back into the storm.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child == 0:
            self._become(cache)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return child, cache

    def _become(self, cache: Path) -> None:
        """The child: the whole command, its words into a file."""
        from distill.interrupt import Interrupted

        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            words = os.open(self.folder / f"{cache.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(words, 1)
            os.dup2(words, 2)
            status = self._run_here(cache)
        except (KeyboardInterrupt, Interrupted):  # before the command was under way, or behind its end
            status = 130
        finally:
            os._exit(status)

    def _run_here(self, cache: Path) -> int:
        from distill.cli import main as distill

        try:
            distill(["cache-teacher", str(self.folder / "experiment.yaml"), "--cache.dir", str(cache)])
        except SystemExit as ended:
            return int(ended.code or 0)
        raise AssertionError("the command line ends with SystemExit")

    def _time(self, child: int, cache: Path) -> tuple[float, float]:
        """Seconds until the cache's folder is there, and until the end."""
        started = time.monotonic()
        while not cache.exists() and not exited(child):
            time.sleep(0.0005)
        before = time.monotonic() - started
        assert self._wait(child) == 0, self._said(cache.name)
        return before, time.monotonic() - started

    def _wait(self, child: int) -> int:
        deadline = time.monotonic() + PATIENCE
        while not exited(child):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                self.problems.append("a process hung")
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-500:]


def exited(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def where(cache: Path) -> str:
    """What a kill interrupted, as far as the files tell."""
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
