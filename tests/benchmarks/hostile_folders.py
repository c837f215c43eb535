"""Opens folders and files that a stranger could send, with real commands, and looks what they reach outside.

    python tests/benchmarks/hostile_folders.py

Each case is a copy of a good folder with one trap in it. Code that runs would leave a file; a secret beside the folder
must neither change nor be read; nothing may ask the network, hang or end in a traceback. Prints a tally, and exits with
status 1 if a trap worked. The commands run in processes that are forked from one which has imported everything.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hostile_data_traps  # noqa: F401  # registers its traps
from forked import Children, distill_here, write_experiment
from hostile_traps import TRAPS, Trap

REFUSED = 2
"""Exit status of a refusal."""


RAN, TOUCHED = "code ran", "files outside were touched"


class Range:
    """Good folders to copy, a secret that no command may reach, and the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.logs = folder / "logs"
        self.good, self.outside = folder / "good", folder / "outside"
        for path in (self.logs, self.good, self.outside / "secrets"):
            path.mkdir(parents=True)
        os.environ |= {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home/.cache")}
        (folder / "home").mkdir()
        self.children = Children(self.logs, self._hung)
        self._make_good()
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "text.jsonl",
            "secrets/key",
            "secrets/empty",
        ):
            (self.outside / name).write_text('{"text": "SECRET", "weight_map": {}}\n')
        (self.outside / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Model: ...\nmake = print\n")
        self.parent, self.log = os.getpid(), folder / "reached"
        self.log.touch()
        sys.addaudithook(self._watch)

    def _hung(self, problem: str) -> None:
        if self.problems[-1:] != [problem]:  # it is said until the process is gone
            self.problems.append(problem)

    def _make_good(self) -> None:
        """Make a run with its cache, and a student of the built-in class."""
        small = {"class_path": "compact", "options": {"hidden_size": 16, "layers": 1, "heads": 2}}
        evaluate = {"cost": False, "texts": 0, "max_samples": 1}
        train = {"max_steps": 2, "precision": "32-true", "validate_every_steps": 2, "batch_size": 2}
        made = write_experiment(
            self.good,
            cache={"batch_size": 3, "shard_samples": 4, "held_out_samples": 2, "max_samples": 6},
            student=small,
            train=train,
            evaluate=evaluate,
        )
        made.write_text(made.read_text() + "preflight: false\n")
        assert distill_here("run", str(made)) == 0
        shutil.copytree(self.good / "teacher", self.good / "model")

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        """Note what a child opens outside, and any use of the network, which is denied."""
        if os.getpid() == self.parent:
            return
        network = event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple))
        if network or (event == "open" and str(arguments[0]).startswith(f"{self.outside}/")):
            with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND), "w") as file:
                file.write(f"{'the network' if network else arguments[0]}\n")
        if network:
            raise PermissionError("no network")

    def run(self, trap: Trap) -> None:
        """Set a trap in a copy of the good folders, open it, and note what it reached."""
        place = self.folder / "case"
        for used in (place, self.folder / "home"):
            shutil.rmtree(used, ignore_errors=True)
        shutil.copytree(self.good, place)
        text = (place / "experiment.yaml").read_text().replace(str(self.good), str(place))
        (place / "experiment.yaml").write_text(text)
        arguments = trap.set(place, self.outside)
        before, known = fingerprint(self.outside), len(self.problems)
        self.log.write_text("")
        (place / "prompt").write_text("Hello\n")
        os.dup2(os.open(place / "prompt", os.O_RDONLY), 0)
        os.chdir(trap.where(place))
        status = self.children.wait(self.children.start("command", *arguments))
        os.chdir(self.folder)
        said = self.children.said("command")
        if status not in trap.statuses:
            self.problems.append(f"status {status}")
        if "Traceback" in said or (status == REFUSED and said.rstrip().splitlines()[-1][:9] != "distill: "):
            self.problems.append("a traceback, or no line that says why")
        if (self.folder / "ran").exists():
            self.problems.append(RAN)
            (self.folder / "ran").unlink()
        if fingerprint(self.outside) != before:
            self.problems.append(TOUCHED)
        for reached in sorted(set(self.log.read_text().splitlines())):
            self.problems.append(f"reached {reached}")
        if any("SECRET" in path.read_text(errors="replace") for path in readable(place)):
            self.problems.append("a secret was copied")
        self.problems[known:] = [f"{trap.name}: {problem}: {said[-300:]!r}" for problem in self.problems[known:]]


def readable(folder: Path) -> list[Path]:
    """Return the plain files below a folder that are no links."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def fingerprint(folder: Path) -> dict[str, str]:
    """Return names, dates and content of all that lies in a folder."""
    return {
        str(
            path
        ): f"{path.lstat().st_mtime_ns} {hashlib.sha256(path.read_bytes() if path.is_file() else b'').hexdigest()}"
        for path in sorted(folder.rglob("*"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="traps whose name has these words")
    only: str = parser.parse_args().only
    began, kinds = time.monotonic(), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        grounds = Range(Path(name).resolve())
        opened = [trap for trap in TRAPS if only in trap.name]
        for trap in opened:
            grounds.run(trap)
            kinds[trap.name.split(":")[0]] += 1
        os.chdir("/")
    for kind, count in sorted(kinds.items()):
        print(f"{count:5}  {kind}")
    print(*grounds.problems, sep="\n", end="\n" if grounds.problems else "")
    ran, touched = (sum(word in problem for problem in grounds.problems) for word in (RAN, TOUCHED))
    print(
        f"{len(opened)} hostile folders and files: {ran} ran code, {touched} touched files outside, "
        f"{len(grounds.problems)} problems, {time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if grounds.problems else 0)


if __name__ == "__main__":
    main()
