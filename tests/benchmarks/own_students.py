"""Trains students of a grid of wrong constructors, heads and bodies; each must be refused in one line, the sound not.

    python tests/benchmarks/own_students.py --pairs 400 --preflight

Every single fault is tried with all else sound, then so many random pairs and triples. Prints a tally; exit status 1
when a traceback or anything but one line came out, a case took too long, or a wrong student was trained.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType

from own_student_faults import Case, random_faults, single_faults

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
"""Seconds for one case."""


def judge(case: Case, status: object, out: str, err: str) -> str:
    """Return `fine`, or what is wrong with the command's end."""
    if "Traceback" in out + err.replace("\\nTraceback", "") and case.constructor != "ValueError of two lines":
        return "traceback"
    if case.is_sound:
        return "fine" if status == 0 else f"refused: {err.strip()[:200]}"
    if status != 2:
        return f"accepted (status {status})"
    lines = [line for line in err.splitlines() if line.strip()]
    return "fine" if len(lines) == 1 and len(lines[0]) > 20 else f"{len(lines)} lines: {err[:200]!r}"


class _Late(BaseException):
    pass


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _Late


def run(arguments: list[str]) -> tuple[object, str, str]:
    """Return status, stdout and stderr of a command in this process."""
    from distill.cli import main

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(PATIENCE)
    status: object = "none"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
    except SystemExit as ended:
        status = ended.code
    except _Late:
        status = "late"
    except BaseException:
        err.write(traceback.format_exc())
        status = "raised"
    finally:
        signal.alarm(0)
    return status, out.getvalue(), err.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="try each so-manieth of the single faults")
    parser.add_argument("--first", type=int, default=0, help="begin with this one of the single faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preflight", action="store_true", help="forecast first, as users' commands do")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = make_experiment(folder, options.preflight)
        made = run(["cache-teacher", file, "--student.options", "{layers: 1}"])
        assert made[0] == 0, made
        for number, case in enumerate(
            [*single_faults()[options.first :: options.every], *random_faults(options.pairs, options.seed)]
        ):
            student = folder / f"student{number}.py"
            student.write_text(case.source())
            given = ["--student.class_path", f"{student}:Student", "--run_dir", str(folder / f"run{number}")]
            verdict = judge(case, *run(["train-student", file, *given]))
            tally[verdict.split(":")[0].split(" (")[0]] += 1
            if verdict != "fine":
                print(f"{case}: {verdict}", flush=True)
    print(json.dumps(dict(tally)))
    return int(set(tally) != {"fine"})


def make_experiment(folder: Path, preflight: bool) -> str:
    """Return the file of a tiny experiment in `folder`, with the teacher and corpus of the tests."""
    import importlib.util

    import yaml

    spec = importlib.util.spec_from_file_location("conftest_of_tests", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = conftest
    spec.loader.exec_module(conftest)
    texts = conftest.passages(20)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = {
        "corpus": {"path": str(folder / "corpus.jsonl"), "sequence_length": 48, "held_out": 0.2},
        "teacher": {"model": str(conftest.save_teacher(folder / "teacher", texts)), "quantization": "none"},
        "cache": {"batch_size": 4, "shard_samples": 8, "held_out_samples": 4, "dir": str(folder / "cache")},
        "evaluate": {"control": False},
        "train": {"batch_size": 4, "precision": "32-true", "max_steps": 2, "loggers": []},
        "preflight": preflight,
        "run_dir": str(folder / "run"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
