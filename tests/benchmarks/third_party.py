"""Trains students that others wrote, wrapped in a file each, and prints each package's way through the commands.

    make third-party ARGS="--only mambapy"

Every student goes through plan (with a forecast, also with activation checkpointing), a training, the same training
stopped after every step and resumed (to the same bytes), evaluation, export to Hugging Face (opened without distill)
and ONNX, and a chat. A cell is `yes`, `no` with one line of reason (a refusal, printed below), or `WRONG`: a traceback,
or an answer that is not the same. The exit status is 1 if there is one. Three of the wrappers stand in
`students/README.md`, the others in `third_party/`.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import own_students
from own_students import ROOT, make_experiment, run

WRAPPERS = Path(__file__).with_name("third_party")
SIZES = "{width: 32, layers: 3}"
STEPS = 4
COLUMNS = ("plan", "checkpointing", "train", "resume", "evaluate", "hf", "onnx", "chat")


class Journey:
    """One student's way through the commands, in a folder of its own."""

    def __init__(self, name: str, source: str, folder: Path, file: str) -> None:
        self.folder, self.notes = folder / name, dict[str, str]()
        self.folder.mkdir()
        student = self.folder / f"{name.replace('-', '_')}_student.py"
        student.write_text(source, encoding="utf-8")
        found = re.search(r"^class (\w+)\(nn\.Module\)", source, re.MULTILINE)
        assert found is not None, name
        self.named = f"{student}:{found[1]}"
        self.arguments = [file, "--student.class_path", self.named, "--student.options", SIZES]
        self.arguments += ["--train.max_steps", str(STEPS), "--train.checkpoint_every_steps", "1"]

    def plan(self, *more: str) -> str:
        """Forecast; a forecast that is not there counts as a refusal."""
        status, out, err = run(["plan", *self.arguments, "--run_dir", self._run("plan"), "--card", "12GiB", *more])
        missing = [line for line in (out + err).splitlines() if "no forecast" in line]
        return self._verdict("plan", 2 if missing and not err else status, missing[0] if missing else err)

    def checkpointing(self) -> str:
        return self.plan("--train.activation_checkpointing", "true")

    def train(self) -> str:
        status, out, err = run(["train-student", *self.arguments, "--run_dir", self._run("run")])
        self.notes["said"] = " ".join(line for line in out.splitlines() if "documents that share" in line)
        return self._verdict("train", status, err)

    def resume(self) -> str:
        """Stop after every step; in the end the weights are those of the undisturbed training."""
        resumed = ["train-student", *self.arguments, "--run_dir", self._run("resumed"), "--resume"]
        for _ in range(STEPS - 1):
            status, _, err = run([*resumed, "--train.max_time", "0s"])
            if status != 130:
                return self._verdict("resume", status, err)
        status, _, err = run(resumed)
        if status == 0 and self._weights("run") != self._weights("resumed"):
            return self._wrong("resume", "other weights than those of the undisturbed training")
        return self._verdict("resume", status, err)

    def evaluate(self) -> str:
        return self._command("evaluate", "evaluate", *self.arguments, "--run_dir", self._run("run"))

    def hf(self) -> str:
        return self._export("hf", "--with_code")

    def onnx(self) -> str:
        return self._export("onnx")

    def chat(self) -> str:
        stdin, sys.stdin = sys.stdin, io.StringIO("Hello\n")
        try:
            chat = ["--class_path", self.named, "--max_new_tokens", "4", "--seed", "0"]
            return self._command("chat", "chat", self._run("run"), *chat)
        finally:
            sys.stdin = stdin

    def _export(self, form: str, *more: str) -> str:
        to = ["--to", str(self.folder / form), "--format", form, "--class_path", self.named]
        return self._command(form, "export", self._run("run"), *to, *more)

    def _command(self, column: str, *arguments: str) -> str:
        status, _, err = run([*arguments])
        return self._verdict(column, status, err)

    def _run(self, name: str) -> str:
        return str(self.folder / name)

    def _weights(self, run: str) -> bytes:
        return (self.folder / run / "student" / "model.safetensors").read_bytes()

    def _verdict(self, column: str, status: object, err: str) -> str:
        lines = [line for line in err.splitlines() if line.strip()]
        if status == 0 and not lines:
            return "yes"
        if status == 2 and len(lines) == 1 and "Traceback" not in err:
            self.notes[column] = lines[0].strip()
            return "no"
        ours = [line.strip() for line in lines if f"{ROOT}/distill" in line]
        return self._wrong(column, f"status {status}: {' | '.join([*ours[-4:], *lines[-1:]])}")

    def _wrong(self, column: str, why: str) -> str:
        self.notes[column] = why
        return "WRONG"


def wrappers() -> Iterator[tuple[str, str]]:
    """Yield the packages and the sources of their students: those of the README first."""
    text = (ROOT / "students" / "README.md").read_text(encoding="utf-8")
    for source in re.findall(r"```python\n(\"\"\"A student of .*?)```", text, re.DOTALL):
        yield re.findall(r"A student of ([\w-]+)", source)[0].lower(), source
    for file in sorted(WRAPPERS.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        yield re.findall(r"A student of ([\w-]+)", source)[0].lower(), source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="these packages")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=COLUMNS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    own_students.PATIENCE = 1200  # some compile their kernels
    table: list[tuple[str, list[str]]] = []
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = make_experiment(folder, preflight=False)
        made = run(["cache-teacher", file, "--student.options", "{layers: 1}"])
        assert made[0] == 0, made
        for package, source in wrappers():
            if not options.only or package in options.only:
                journey = Journey(package, source, folder, file)
                steps: dict[str, Callable[[], str]] = {column: getattr(journey, column) for column in options.columns}
                table.append((package, [step() for step in steps.values()]))
                print(package, *table[-1][1], journey.notes, flush=True)
    print(f"\n| package | {' | '.join(options.columns)} |\n|---|{'---|' * len(options.columns)}")
    for package, cells in table:
        print(f"| {package} | {' | '.join(cells)} |")
    print(f"\n{time.process_time() - began:.0f} s of processor time")
    return int(any("WRONG" in cells for _, cells in table))


if __name__ == "__main__":
    sys.exit(main())
