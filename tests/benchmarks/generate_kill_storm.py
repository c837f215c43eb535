"""Kills real `distill generate` processes at random moments, and compares what they wrote with an undisturbed folder.

    python tests/benchmarks/generate_kill_storm.py --kills 30

The processes are forked from one that has imported everything; each is killed by SIGKILL within the time that an
undisturbed one takes, then the same command goes on, until the folder is complete; then another folder begins. Every
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


class Storm:
    """Texts that nobody disturbed, and any number of folders that were."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.problems = folder, random.Random(seed), list[str]()
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
        done = folders = continued = 0
        while done < kills:
            name = f"texts-{folders}"
            folders += 1
            for _ in range(3):
                done += self._killed(name)
            continued += len(list((self.folder / name).glob("parts/*"))) > 0
            status = self.children.wait(self.children.start(name, *self._command(name)))
            if status != 0:
                self.problems.append(f"{name}: status {status}: {self.children.said(name)[-300:]}")
            elif contents(self.folder / name) != self.expected:
                self.problems.append(f"{name}: other bytes than undisturbed")
        print(f"{done} kills, {folders} folders, {continued} of them with parts from before the last kill")
        for problem in self.problems:
            print(problem)
        print("all as undisturbed" if not self.problems else f"{len(self.problems)} problems")
        return 1 if self.problems else 0

    def _killed(self, name: str) -> bool:
        """Begin or go on, and kill at a random moment; False if the process had ended before."""
        child = self.children.start(name, *self._command(name))
        deadline = time.monotonic() + self.random.uniform(0.0, self.seconds)
        while time.monotonic() < deadline and not exited(child):
            time.sleep(0.001)
        had_ended = exited(child)
        if not had_ended:
            send(signal.SIGKILL, child)
        self.children.wait(child)
        return not had_ended


if __name__ == "__main__":
    forked.main(__doc__, 30, Storm)
