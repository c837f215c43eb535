"""Gives every key of the experiment file odd values, one at a time; each must be refused in one line, or be taken.

    python tests/benchmarks/experiment_keys.py
    python tests/benchmarks/experiment_keys.py --every 7 --plan

`--every 7` tries each seventh case. `--plan` also runs `distill plan` on every file that was taken. A value is taken
rightly only if the experiment holds it as it was written. Prints a tally; exit status 1 when a traceback, more than one
line, a late answer, or a value of another meaning came out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import io
import math
import signal
import tempfile
import traceback
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment

PATIENCE = 20
"""Seconds for one case."""
MINIMAL: dict[str, Any] = {"corpus": {"path": "data"}, "teacher": {"model": "smollm2-135m-demo"}}
ODD: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "0": 0,
    "-1": -1,
    "3": 3,
    "0.5": 0.5,
    "-0.0": -0.0,
    "2**31": 2**31,
    "2**63": 2**63,
    "2**64": 2**64,
    "-2**63": -(2**63),
    "10**400": 10**400,
    "1e300": 1e300,
    "-1e300": -1e300,
    "5e-324": 5e-324,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "empty": "",
    "blank": "  \t ",
    "text": "nothing of the kind",
    "number as text": "7",
    "nan as text": "nan",
    "null as text": "null",
    "unicode": "naïve 日本語 😀",
    "right to left": "\u202eabc",
    "NUL": "a\0b",
    "new lines": "a\nb\r\nc",
    "escape": "\x1b[31mred",
    "long": "x" * 100_000,
    "path up": "../../../../etc/passwd",
    "dashes": "--cache.seed",
    "list": [],
    "list of null": [None],
    "list of lists": [[[]]],
    "list of numbers": [1, 2.5, -3],
    "list of text": ["a", ""],
    "mapping": {},
    "mapping of null": {"a": None},
    "mapping of numbers": {1: 2},
    "class_path": {"class_path": "os.system"},
    "init_args": {"class_path": "os.system", "init_args": {"command": "true"}},
}


@dataclass(frozen=True)
class Case:
    """One key and one value; the key of a section's keys is `train.epochs`."""

    key: str
    name: str
    as_override: bool = False


def keys() -> Iterator[str]:
    """Yield all keys, sections too."""
    for section, kind in typing.get_type_hints(Experiment).items():
        yield section
        if dataclasses.is_dataclass(kind):
            yield from (f"{section}.{entry.name}" for entry in dataclasses.fields(kind))


def all_cases() -> list[Case]:
    """Return every key with every odd value, in the file and as an override."""
    return [Case(key, name, as_override) for as_override in (False, True) for key in keys() for name in ODD]


def content(case: Case) -> dict[str, Any]:
    """Return the experiment file with the case's value."""
    made = copy.deepcopy(MINIMAL)
    section, _, name = case.key.partition(".")
    (made.setdefault(section, {}) if name else made)[name or section] = ODD[case.name]
    return made


def judge(case: Case, folder: Path) -> str:
    """Return `refused`, `taken`, or what is wrong with the answer."""
    path, overrides = folder / "experiment.yaml", []
    if case.as_override:
        path.write_text(yaml.safe_dump(MINIMAL))
        overrides = [f"--{case.key}={_as_text(ODD[case.name])}"]
    else:
        path.write_text(yaml.safe_dump(content(case)))
    try:
        experiment = load_experiment(str(path), overrides)
    except UserError as refusal:
        lines = str(refusal).splitlines()
        return "refused" if len(lines) == 1 else f"{len(lines)} lines"
    section, _, name = case.key.partition(".")
    held = getattr(experiment, section)
    return "taken" if _means(ODD[case.name], getattr(held, name) if name else held, case) else "another meaning"


def _as_text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    )


def _means(given: Any, held: Any, case: Case) -> bool:
    """Tell whether the experiment holds what was given. Text may stand for a number, but not the other way round."""
    if dataclasses.is_dataclass(held):
        return all(_means(value, getattr(held, key), case) for key, value in (given or {}).items())
    if isinstance(held, bool) or isinstance(given, bool):
        return given is held or (case.as_override and str(given).lower() == str(held).lower())
    if isinstance(given, str) and isinstance(held, (int, float)):
        return float(given) == held
    if case.as_override and isinstance(held, str):
        return _as_text(given) == held
    if given == "null" and held is None:
        return True  # the text null in a key that may be left out
    return type(held) in (type(given), float) and given == held


class _Late(BaseException):
    pass


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _Late


def run(case: Case, folder: Path, plans: bool = False) -> str:
    """Return the judgement of a case, within the time. `plans`: a file that was taken is planned with, too."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(PATIENCE)
    try:
        found = judge(case, folder)
        return _plan(folder) if found == "taken" and plans and not case.as_override else found
    except _Late:
        return "late"
    except Exception:
        return f"traceback: {traceback.format_exc().splitlines()[-1]}"
    finally:
        signal.alarm(0)


def _plan(folder: Path) -> str:
    from distill.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["plan", str(folder / "experiment.yaml")])
        except SystemExit as ended:
            lines = err.getvalue().strip().splitlines()
            if ended.code == 2:
                return "refused by plan" if len(lines) == 1 else f"plan: {len(lines)} lines"
            return "planned" if ended.code in (0, 3) else f"plan: status {ended.code}"
    return "plan: no end"


FINE = ("refused", "taken", "refused by plan", "planned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in all_cases()[:: options.every]:
            found = run(case, Path(folder), options.plan)
            tally[found if found in FINE else found.split(":")[0]] += 1
            if found not in FINE:
                print(f"{case}: {found}", flush=True)
    print(f"{sum(tally.values())} cases: {', '.join(f'{number} {found}' for found, number in sorted(tally.items()))}")
    raise SystemExit(any(found not in FINE for found in tally))


if __name__ == "__main__":
    main()
