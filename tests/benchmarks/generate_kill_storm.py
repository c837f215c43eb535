"""Kills real `distill generate` processes at random moments, and compares what they wrote with an undisturbed folder.

    python tests/benchmarks/generate_kill_storm.py --kills 30

The processes are forked from one that has imported everything. Each is killed by SIGKILL at a random moment, before its
first part or after one or two; then the same command goes on, until the folder is complete, and another begins. Every
byte must be that of the undisturbed folder. Prints a tally; exit status 1 when a folder came out different.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import forked  # first: it sets the number of threads
from forked import Children, contents, distill_here, exited, send, write_experiment

SECTIONS = {
    "generate": {"prompt_tokens": 8, "max_new_tokens": 12, "group": 2, "batch_size": 4, "samples_per_prompt": 2},
    "preflight": False,
}

KILLS_A_FOLDER = 3


class Storm:
    """Texts that nobody disturbed, and any number of folders that were."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.problems = folder, random.Random(seed), list[str]()
        self.within = 0
        self.file = write_experiment(folder, **SECTIONS)
        self.children = Children(folder, self.problems.append)
        assert distill_here(*self._command("warm")) == 0  # imports what is imported late
        began = time.monotonic()
        assert distill_here(*self._command("undisturbed")) == 0
        self.seconds = time.monotonic() - began
        self.expected = contents(folder / "undisturbed")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process that has just begun

    def _command(self, name: str) -> list[str]:
        return ["generate", str(self.file), "--generate.to", str(self.folder / name)]

    def rage(self, kills: int) -> int:
        """Kill so many processes; the exit status."""
        done = folders = 0
        while done < kills:
            name = f"texts-{folders}"
            folders += 1
            for _ in range(KILLS_A_FOLDER):
                done += self._killed(name)
            status = self.children.wait(self.children.start(name, *self._command(name)))
            if status != 0:
                self.problems.append(f"{name}: status {status}: {self.children.said(name)[-300:]}")
            elif contents(self.folder / name) != self.expected:
                self.problems.append(f"{name}: other bytes than undisturbed")
        print(f"{done} kills in {folders} folders, {self.within} of them after the first part of a start was written")
        for problem in self.problems:
            print(problem)
        print("all as undisturbed" if not self.problems else f"{len(self.problems)} problems")
        return 1 if self.problems else 0

    def _parts(self, name: str) -> int:
        return len(list((self.folder / name).glob("parts/*.jsonl")))

    def _killed(self, name: str) -> bool:
        """Begin or go on, and kill at a random moment after none, one or two parts; False if it had ended before."""
        before, wait = self._parts(name), self.random.randint(0, 2)
        child = self.children.start(name, *self._command(name))
        while self._parts(name) < before + wait and not exited(child):
            time.sleep(0.0005)
        deadline = time.monotonic() + self.random.uniform(0.0, self.seconds if wait == 0 else self.seconds / 6)
        while time.monotonic() < deadline and not exited(child):
            time.sleep(0.0005)
        had_ended = exited(child)
        if not had_ended:
            send(signal.SIGKILL, child)
            self.within += self._parts(name) > before
        self.children.wait(child)
        return not had_ended


if __name__ == "__main__":
    forked.main(__doc__, 30, Storm)
