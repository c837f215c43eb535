"""Kills real `train-student` processes at random instants, continues each, and compares with an undisturbed student.

    python tests/benchmarks/train_kill_storm.py --kills 300

The processes are forked from one that has imported everything, so that many of them fit into a minute; what runs in
them is the whole command, `distill train-student FILE --resume`. The student has dropout, the steps are accumulated,
and there are several epochs. Now and then the newest checkpoint is damaged, `--train.max_time` ends a start, or there
is a forecast first. Prints a tally of where the kills hit; exit status 1 when a student came out different.
"""

from __future__ import annotations

import collections
import random
import signal
import time
from pathlib import Path

import forked
from forked import Children, contents, distill_here, exited, send, write_experiment

KILLS_A_RUN = 12
STUDENT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}  # dropout is 0.1
TRAIN = {
    "epochs": 4,
    "batch_size": 2,
    "accumulate_grad_batches": 2,
    "precision": "32-true",
    "learning_rate": 5e-3,
    "validate_every_steps": 5,
    "checkpoint_every_steps": 3,
    "log_every_steps": 4,
}


class Storm:
    """A tiny cache, a training that nobody disturbed, and any number of trainings that were."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.file = write_experiment(
            folder,
            cache={"dir": str(folder / "cache"), "held_out_samples": 6, "max_samples": 38},
            student={"class_path": "huggingface", "options": {"config": STUDENT}},
            train=TRAIN,
        )
        self.hits: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.children = Children(folder, self.problems.append)
        self.signals: list[signal.Signals] = []
        """Signals to come: of each ten, six are SIGKILL."""
        self.story: list[str] = []
        """Events of the training at hand."""
        assert distill_here("cache-teacher", str(self.file), "--run_dir", str(folder / "warm")) == 0
        assert distill_here(*self._command("warm", "--train.max_steps", "6")) == 0  # imports what is imported late
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # of the instants before the command has its own
        started = time.monotonic()
        status = self.children.wait(self._start("undisturbed"))
        assert status == 0, self.children.said("undisturbed")
        self.duration = time.monotonic() - started
        self.undisturbed = contents(folder / "undisturbed" / "student")
        self.steps = newest_step(folder / "undisturbed")

    def rage(self, kills: int) -> int:
        started, runs, thrown = time.monotonic(), 1, 0
        self._stop_in_time("run0")
        self._compare("run0")
        while thrown < kills:
            name = f"run{runs}"
            thrown += self._disturb(name, min(kills - thrown, KILLS_A_RUN))
            self._compare(name)
            runs += 1
        for where, count in sorted(self.hits.items()):
            print(f"{count:5}  {where}")
        left = sum(len(half_written(self.folder / f"run{run}")) for run in range(runs))
        print(f"{left:5}  half files that nobody removed")
        print(f"{thrown:5}  kills, {runs} trainings of {self.steps} steps, {time.monotonic() - started:.0f} s")
        print(*self.problems, sep="\n", end="\n" if self.problems else "")
        wrong = len({problem.split(":")[0] for problem in self.problems})
        print(f"{runs - wrong} of {runs} students are byte for byte the undisturbed one")
        return 1 if self.problems else 0

    def _stop_in_time(self, name: str) -> None:
        """Three starts whose time is over at once: each makes a step and keeps it. Then one that has all the time."""
        for step in (1, 2, 3):
            status = self.children.wait(self._start(name, "--train.max_time", "0s"))
            said = self.children.said(name)
            if (status, newest_step(self.folder / name)) != (130, step) or "train.max_time is over" not in said:
                self.problems.append(f"{name}: exit status {status} at step {step} of max_time: {said[-1500:]}")
        self._check_end(name, self.children.wait(self._start(name)), None, limited=False, damaged=None)

    def _disturb(self, name: str, most: int) -> int:
        """Kill until there were `most`, then leave it alone; the number of kills."""
        run, kills, damaged = self.folder / name, 0, None
        self.story = []
        while True:
            limit = ["--train.max_time", "0s"] if self.random.random() < 0.1 else []
            child = self._start(name, *limit)
            sent = self._kill(child, run) if kills < most and not limit else None
            status = self.children.wait(child)
            kills += sent is not None
            self._check_end(name, status, sent, limited=bool(limit), damaged=damaged)
            if status == 0 or any(problem.startswith(f"{name}:") for problem in self.problems):
                return kills
            if limit:
                self._note("max_time was over", run)
            damaged = self._damage(run) if kills < most and self.random.random() < 0.2 else None

    def _check_end(
        self, name: str, status: int, sent: signal.Signals | None, limited: bool, damaged: Path | None
    ) -> None:
        said = self.children.said(name)
        if sent == signal.SIGKILL:
            return
        # What was asked to stop may have been at its end already.
        allowed = (0, 130) if sent or limited else (0,)
        if status not in allowed or "Traceback" in said:
            self.problems.append(f"{name}: exit status {status} after {sent}: {said[-1500:]}")
        if damaged is not None and sent is None and f"{damaged.name}: damaged" not in said:
            self.problems.append(f"{name}: nothing was said of the damaged {damaged.name}: {said[-500:]}")

    def _kill(self, child: int, run: Path) -> signal.Signals | None:
        """Wait for a random instant and send a signal; None: the process was done before."""
        kind = self.random.choice(["clock", "clock", "step", "step", "half", "saving"])
        first, ahead = newest_step(run), self.random.randrange(1, 16)
        begun = time.monotonic()
        after = self.random.uniform(0, self.duration * (1 - 0.7 * first / self.steps))
        there = {
            "clock": lambda: time.monotonic() - begun > after,
            "step": lambda: newest_step(run) > first + ahead,
            "half": lambda: newest_step(run) > first + ahead - 3 and half_written(run),
            "saving": lambda: (run / ".student.new").exists(),
        }[kind]
        while not there() and not exited(child):
            time.sleep(0.0003 if kind == "half" else 0.002)
        if kind in ("step", "saving"):
            time.sleep(self.random.uniform(0, 0.02))
        if exited(child):
            return None
        if not self.signals:
            self.signals = [signal.SIGKILL] * 6 + [signal.SIGINT] * 2 + [signal.SIGTERM] * 2
            self.random.shuffle(self.signals)
        signum = self.signals.pop()
        send(signum, child)
        self._note(f"{signum.name:8} {where(run)}", run)
        return signum

    def _damage(self, run: Path) -> Path | None:
        """Cut the newest checkpoint, or flip a bit of it, where another whole one is left and it is still needed."""
        from distill.training.checkpoints import is_whole

        found = [path for path in sorted((run / "checkpoints/student").glob("step-*.ckpt")) if is_whole(path)]
        if len(found) < 2 or (run / "student").exists():
            return None
        content = bytearray(found[-1].read_bytes())
        if self.random.random() < 0.5:
            content = content[: self.random.randrange(len(content))]
        else:
            content[len(content) // 2] ^= 4
        found[-1].write_bytes(content)
        self._note("damaged the newest checkpoint", run)
        return found[-1]

    def _note(self, words: str, run: Path) -> None:
        self.hits[words] += 1
        self.story.append(f"{words} at step {newest_step(run)}")

    def _compare(self, name: str) -> None:
        import torch

        from distill.training.checkpoints import is_whole

        run, undisturbed = self.folder / name, self.folder / "undisturbed"
        found = contents(run / "student")
        other = sorted(
            file for file in found.keys() | self.undisturbed if found.get(file) != self.undisturbed.get(file)
        )
        if other:
            story = "; ".join(self.story)
            self.problems.append(f"{name}: not the undisturbed student ({', '.join(other)}) after: {story}")
            return
        for file in ("best.ckpt", f"step-{self.steps:08}.ckpt"):
            if not is_whole(run / "checkpoints/student" / file):
                self.problems.append(f"{name}: its {file} is damaged or missing after: {'; '.join(self.story)}")
                continue
            ours, theirs = (
                torch.load(folder / "checkpoints/student" / file, weights_only=True)["state_dict"]
                for folder in (run, undisturbed)
            )
            if any(not torch.equal(ours[key], theirs[key]) for key in theirs):
                self.problems.append(f"{name}: its {file} is another")

    def _start(self, name: str, *options: str) -> int:
        # A forecast takes longer than the training.
        skipped = [] if self.random.random() < 0.2 else ["--preflight", "false"]
        return self.children.start(name, *self._command(name, *options, *skipped))

    def _command(self, name: str, *options: str) -> list[str]:
        return ["train-student", str(self.file), "--run_dir", str(self.folder / name), *options, "--resume"]


def newest_step(run: Path) -> int:
    """The number of the newest checkpoint; 0: there is none."""
    return max((int(path.stem[5:]) for path in (run / "checkpoints/student").glob("step-*.ckpt")), default=0)


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints/student").glob("*.tmp"))


def where(run: Path) -> str:
    """Return the work that a kill interrupted, as far as the files tell."""
    if (run / "student").exists():
        return "behind the end"
    if (run / ".student.new").exists():
        return "while the student was saved"
    half = {path.name[:4] for path in half_written(run)}
    if half:
        return "with half of " + ("the best weights" if half == {"best"} else "a checkpoint")
    if not (run / "checkpoints/student").exists():
        return "before the training"
    return "between checkpoints" if newest_step(run) else "before the first checkpoint"


if __name__ == "__main__":
    forked.main(__doc__, 300, Storm)
