"""Runs `distill run` on disks that fill up in every phase, makes room, runs it again, and compares all that it made.

    python tests/benchmarks/full_disk_storm.py --disks 40

Each disk is a file system in memory (root may mount one) of a random size, too small for the whole run. The command
must end with one line and status 2, and go on where it was once there is room. Prints a tally of the phases in which
the disks were full; exit status 1 for anything else.
"""

from __future__ import annotations

import collections
import random
import subprocess
import time
from pathlib import Path

import forked
from forked import Children, distill_here, write_experiment
from run_kill_storm import END, SECTIONS, artefacts, where

PAGE_KB = 4
LARGE_KB = 1 << 16


class Storm:
    """A tiny experiment, a run of it on a large disk, and any number of runs on small ones."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.file = write_experiment(folder, **SECTIONS)
        self.hits: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.children = Children(folder, self.problems.append)
        assert distill_here(*self._command("undisturbed")) == 0
        self.expected = artefacts(folder / "undisturbed/run", folder / "pages")
        files = [path for path in (folder / "undisturbed").rglob("*") if path.is_file()]
        self.most_kb = sum(-(-path.stat().st_size // (1024 * PAGE_KB)) * PAGE_KB for path in files)

    def rage(self, disks: int) -> int:
        started, refused = time.monotonic(), 0
        for number in range(disks):
            name = f"disk{number}"
            (self.folder / name).mkdir()
            self._mount(name, f"size={self.random.randrange(PAGE_KB, self.most_kb, PAGE_KB)}k")
            try:
                refused += self._fill(name)
            finally:
                subprocess.run(["umount", str(self.folder / name)], check=True)
        for phase, count in sorted(self.hits.items()):
            print(f"{count:5}  {phase}")
        print(f"{refused:5}  disks were full, of {disks}, {time.monotonic() - started:.0f} s")
        print(*self.problems, sep="\n", end="\n" if self.problems else "")
        return 1 if self.problems else 0

    def _fill(self, name: str) -> bool:
        """Run on a small disk, then with room; tell whether it was full."""
        run = self.folder / name / "run"
        status = self._run(name)
        if status != 0:
            self.hits[where(run)] += 1
            said = self.children.said(name).splitlines()
            lines = [line for line in said if line.startswith("distill: ")]
            if status != 2 or len(lines) != 1 or "Traceback" in "".join(said) or not said[-1].startswith("distill: "):
                self.problems.append(f"{name}: status {status} in {where(run)}: " + "\n".join(said[-25:]))
            elif "disk full" not in lines[0] and "No space left" not in lines[0]:
                self.problems.append(f"{name}: in {where(run)} it says: {lines[0]}")
        self._mount(name, f"remount,size={LARGE_KB}k")
        again = self._run(name)
        if again != 0 or where(run) != END:
            self.problems.append(
                f"{name}: with room, status {again} in {where(run)}: {self.children.said(name)[-2000:]}"
            )
            return status != 0
        found = artefacts(run, self.folder / "pages")
        other = sorted(file for file in found.keys() | self.expected if found.get(file) != self.expected.get(file))
        if other:
            self.problems.append(f"{name}: not as on a large disk: {', '.join(other[:9])} ({len(other)} in all)")
        return status != 0

    def _mount(self, name: str, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder / name)], check=True)

    def _run(self, name: str) -> int:
        return self.children.wait(self.children.start(name, *self._command(name)))

    def _command(self, name: str) -> list[str]:
        options = ["--evaluate.cost", "false", "--train.loggers", "[csv, tensorboard]"]
        return ["run", str(self.file), "--run_dir", str(self.folder / name / "run"), *options]


if __name__ == "__main__":
    forked.main(__doc__, 40, Storm, "disks")
