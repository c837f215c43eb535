"""Kills real `distill run` processes in every phase, continues each run to its end, and compares all that it made.

    python tests/benchmarks/run_kill_storm.py --kills 100

The processes are forked from one that has imported everything; what runs in them is the whole command, with a control,
speeds and texts. Some are real starts of Python instead, killed in their first 50 ms. A kill is any of four signals,
sometimes two at once. Each goes to the phase that had the fewest. Compared are the cache, both models, their
checkpoints, evaluation.json (but for speeds) and the report; counted is the work that was done twice. Prints a tally;
exit status 1 when a run came out different, printed a traceback, or repeated more than a kill may cost.
"""

from __future__ import annotations

import collections
import difflib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked  # first: it sets the number of threads
import torch
from forked import Children, contents, distill_here, exited, send, write_experiment
from train_kill_storm import STUDENT, TRAIN

from distill.cache.making.predict import TeacherModule
from distill.recipes.evaluate.results import Results
from distill.report.page import write_report
from distill.training.module import DistillationModule

ROOT = Path(__file__).resolve().parents[2]
PHASES = [
    *("first 50 ms", "before the cache", "cache", "train student", "save student", "train control", "save control"),
    *("evaluate", "report"),
]
END = "end"
KILLS_A_RUN = 9
EVERY_STEPS = 3
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM] * 2 + [signal.SIGINT] * 2 + [signal.SIGHUP] * 2
BY_SIGNAL = (130, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""Statuses of a process that was asked to end; the negative ones before it has taken the signal over."""
MOST_REDONE = {"batches": 4, "steps": EVERY_STEPS, "measurements": 2}
"""Work that one kill may cost: the batch at hand and those in the writer's queue; the steps since a checkpoint; the
teacher and one student, who are measured together."""
SECTIONS: dict[str, Any] = {
    "corpus": {"sequence_length": 48},
    "cache": {"batch_size": 3, "shard_samples": 4, "held_out_samples": 3, "max_samples": 16},
    "student": {"class_path": "huggingface", "options": {"config": {**STUDENT, "n_positions": 64}}},
    "train": {**TRAIN, "checkpoint_every_steps": EVERY_STEPS, "loggers": ["csv"]},
    "evaluate": {"control": True, "cost_batch_sizes": [1], "texts": 1, "text_tokens": 4},
    "preflight": False,
}


class Storm:
    """A tiny experiment, a run of it that nobody disturbed, and any number of runs that were."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.file = write_experiment(folder, **SECTIONS)
        self.hits: collections.Counter[str] = collections.Counter()
        self.signals: collections.Counter[str] = collections.Counter()
        self.most: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.children = Children(folder, self.problems.append)
        self.work = Work()
        assert distill_here(*self._command("warm")) == 0  # imports what is imported late
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)  # as in a process that has just begun
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.lengths = self._undisturbed()
        self.expected = artefacts(self._run("undisturbed"), folder / "pages")
        self.expected_work = self.work.done()

    def rage(self, kills: int) -> int:
        started, runs, thrown = time.monotonic(), 0, 0
        while thrown < kills:
            name = f"run{runs}"
            self.work.count_in(self.folder / f"{name}.work")
            killed = self._disturb(name, min(kills - thrown, KILLS_A_RUN))
            thrown += killed
            self._compare(name)
            self._compare_work(name, killed)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            runs += 1
        for phase in PHASES:
            print(f"{self.hits[phase]:5}  {phase}")
        print(", ".join(f"{count} {name}" for name, count in sorted(self.signals.items())))
        print("most work done twice after one kill:", ", ".join(f"{self.most[kind]:g} {kind}" for kind in MOST_REDONE))
        print(f"{thrown:5}  kills, {runs} runs, {time.monotonic() - started:.0f} s")
        print(*self.problems, sep="\n", end="\n" if self.problems else "")
        wrong = len({problem.split(":")[0] for problem in self.problems})
        print(f"{runs - wrong} of {runs} runs made what the undisturbed one made")
        return 1 if self.problems else 0

    def _undisturbed(self) -> dict[str, float]:
        """Run the experiment once, and return the seconds of each phase."""
        self.work.count_in(self.folder / "undisturbed.work")
        child = self._start("undisturbed")
        seconds: dict[str, float] = collections.defaultdict(float)
        before = time.monotonic()
        while not exited(child):
            phase, now = where(self._run("undisturbed")), time.monotonic()
            seconds[phase] += now - before
            before = now
            time.sleep(0.0005)
        assert self.children.wait(child) == 0, self.children.said("undisturbed")
        return seconds

    def _disturb(self, name: str, most: int) -> int:
        """Kill until there were `most`, then leave it alone; the number of kills."""
        kills = 0
        while True:
            phase = self._next_phase(name)
            if kills < most and phase == "first 50 ms":
                kills += self._kill_a_beginning(name)
                continue
            child = self._start(name)
            killed = self._kill(child, name, phase) if kills < most else None
            status = self.children.wait(child)
            kills += killed is not None
            self._check_end(name, status, self.children.said(name), killed)
            if status == 0 or any(problem.startswith(f"{name}:") for problem in self.problems):
                return kills

    def _next_phase(self, name: str) -> str:
        """Return a phase that is still to come and had few kills."""
        here = where(self._run(name))
        ahead = PHASES[PHASES.index(here) :] if here in PHASES else []
        ahead.append(PHASES[0])
        return min(ahead, key=lambda phase: self.hits[phase] + self.random.random())

    def _kill(self, child: int, name: str, phase: str) -> signal.Signals | None:
        """Wait for a random instant of the phase and send a signal; None means that the process was done before."""
        run, wanted, deadline = self._run(name), PHASES.index(phase), time.monotonic() + forked.PATIENCE
        while not exited(child) and (here := where(run)) != END and PHASES.index(here) < wanted:
            if time.monotonic() > deadline:
                return None  # it hangs: whoever waits for its end kills it and says so
            time.sleep(0.0003)
        until = time.monotonic() + self.random.uniform(0, self.lengths.get(phase, 0.0))
        while time.monotonic() < until and not exited(child) and where(run) == phase:
            time.sleep(0.0003)
        if exited(child):
            return None
        self.hits[here if (here := where(run)) in PHASES else PHASES[-1]] += 1
        signum = self.random.choice(SIGNALS)
        self._send(child, signum)
        if signum != signal.SIGKILL and self.random.random() < 0.3:  # an impatient user, or a terminal that closes
            time.sleep(self.random.uniform(0, 0.05))
            if not exited(child):
                self._send(child, self.random.choice([signum, *SIGNALS]))
        return signum

    def _send(self, child: int, signum: signal.Signals) -> None:
        self.signals[signum.name] += 1
        send(signum, child)

    def _kill_a_beginning(self, name: str) -> bool:
        """Start Python anew, and send a signal while it imports."""
        command = [sys.executable, "-m", "distill", *self._command(name)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        signum = self.random.choice(SIGNALS)
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            wait_for_our_code(process.pid)
            time.sleep(self.random.uniform(0, 0.05))
            self.signals[signum.name] += 1
            process.send_signal(signum)
            said = process.communicate(timeout=forked.PATIENCE)[0]
        self.hits[PHASES[0]] += 1
        self._check_end(name, process.returncode, said, signum)
        return True

    def _check_end(self, name: str, status: int, said: str, killed: signal.Signals | None) -> None:
        allowed = {0} if killed is None else {0, *BY_SIGNAL, -signal.SIGKILL}
        if status not in allowed or "Traceback" in said:
            _, found, traceback = said.partition("Traceback")
            self.problems.append(
                f"{name}: exit status {status} after {killed}: {found + traceback[:2500] or said[-2500:]}"
            )

    def _compare(self, name: str) -> None:
        found = artefacts(self._run(name), self.folder / "pages") if where(self._run(name)) == END else {}
        other = sorted(file for file in found.keys() | self.expected if found.get(file) != self.expected.get(file))
        if other:
            self.problems.append(f"{name}: not as undisturbed: {', '.join(other[:9])} ({len(other)} in all)")
            for page in set(other) & {"report.html", "report.md"}:
                texts = [each.get(page, b"").decode().splitlines() for each in (self.expected, found)]
                self.problems.append(f"{name}: " + "\n".join(list(difflib.unified_diff(*texts, n=0))[:20])[:9000])

    def _compare_work(self, name: str, kills: int) -> None:
        """Compare the work of all starts of a run with that of an undisturbed one."""
        for kind, count in self.work.done().items():
            redone = count - self.expected_work[kind]
            self.most[kind] = max(self.most[kind], round(redone / max(kills, 1), 1))
            if not 0 <= redone <= kills * MOST_REDONE[kind]:
                self.problems.append(f"{name}: {redone} {kind} more than undisturbed, after {kills} kills")

    def _start(self, name: str) -> int:
        return self.children.start(name, *self._command(name))

    def _run(self, name: str) -> Path:
        return self.folder / name / "run"  # one name for all, because it stands in files

    def _command(self, name: str) -> list[str]:
        return ["run", str(self.file), "--run_dir", str(self._run(name))]


class Work:
    """A count of the batches, steps and measurements of this process and its children: a letter each in a file."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self._count(TeacherModule, "predict_step", b"b")
        self._count(DistillationModule, "training_step", b"s")
        self._count(Results, "put", b"m")

    def count_in(self, file: Path) -> None:
        file.touch()
        self.file = file

    def done(self) -> dict[str, int]:
        assert self.file is not None
        letters = self.file.read_bytes()
        return {"batches": letters.count(b"b"), "steps": letters.count(b"s"), "measurements": letters.count(b"m")}

    def _count(self, owner: type, method: str, letter: bytes) -> None:
        real = getattr(owner, method)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self.file is not None:
                with self.file.open("ab", buffering=0) as file:
                    file.write(letter)
            return real(*arguments, **options)

        setattr(owner, method, counted)


def wait_for_our_code(process: int) -> None:
    """Wait until Python has begun with its imports: before, a signal finds no program that could be quiet or loud."""
    while True:
        try:
            if "site-packages" in Path(f"/proc/{process}/maps").read_text():
                return
        except OSError:
            return


def where(run: Path) -> str:
    """Return the phase that a run is in, as far as its files tell."""
    if not (run / "cache/manifest.json").exists():
        return "before the cache"
    if not (run / "student").exists() and not (run / "checkpoints/student").exists():
        return "cache"
    for role in ("student", "control"):
        if not (run / role).exists():
            return f"save {role}" if (run / f".{role}.new").exists() else f"train {role}"
    if not (run / "evaluation.json").exists():
        return "evaluate"
    return END if (run / "report.html").exists() else "report"


def artefacts(run: Path, scratch: Path) -> dict[str, Any]:
    """Return all that a run made, as far as it does not tell the time; `scratch` is for a copy of its pages' facts."""
    found: dict[str, Any] = {}
    for part in ("cache", "student", "control"):
        found |= {f"{part}/{name}": content for name, content in contents(run / part).items()}
    for path in sorted((run / "checkpoints").rglob("*.ckpt")):
        weights = torch.load(path, weights_only=True)["state_dict"]
        found[str(path.relative_to(run))] = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    evaluation = json.loads((run / "evaluation.json").read_text())
    found["evaluation.json"] = {key: value for key, value in evaluation.items() if key not in ("cost", "speculative")}
    found |= pages(run, scratch, found["evaluation.json"])
    for name, content in pages(run, scratch, evaluation, costs=True).items():
        if (run / name).read_bytes() != content:
            found[f"{name}, which is not of the present facts"] = content
    paths = [path.relative_to(run) for path in run.rglob("*")]
    found["the files' names"] = sorted(str(path) for path in paths if path.parts[0] != "logs")
    return found


def pages(run: Path, scratch: Path, evaluation: dict[str, Any], costs: bool = False) -> dict[str, bytes]:
    """Return the pages of a run with this content of evaluation.json, and with or without its costs."""
    copy = scratch / run.name
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    shutil.copytree(run / "logs", copy / "logs")
    (copy / "evaluation.json").write_text(json.dumps(evaluation))
    if costs:
        shutil.copy(run / "costs.jsonl", copy)
    write_report(copy)
    return {name: (copy / name).read_bytes() for name in ("report.html", "report.md")}


if __name__ == "__main__":
    forked.main(__doc__, 100, Storm)
