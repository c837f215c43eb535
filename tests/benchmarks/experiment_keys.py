"""Gives every key of the experiment file odd values, one at a time; each must be refused in one line, or be taken.

    python tests/benchmarks/experiment_keys.py
    python tests/benchmarks/experiment_keys.py --plan --every 3

`--plan` also runs `distill plan` on everything that was taken, with a tiny teacher; what it simulated once is not
simulated again. `--every 3` tries each third case. A value is taken rightly only if the experiment holds it as it was
written. Prints a tally; exit status 1 when a traceback, more than one line, a late answer, or a value of another
meaning came out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import io
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from experiment_values import ODD, RAW, SAME, WHOLE, keys, own_values

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.system import failures

PATIENCE, LONGEST_WAIT = 30, 300
"""Seconds of the processor, and of the clock, for one case."""
LONGEST = 2_000
"""Characters of a message beside the value that it is about."""
MINIMAL: dict[str, Any] = {"corpus": {"path": "data"}, "teacher": {"model": "smollm2-135m-demo"}}
FINE = ("refused", "taken", "refused by plan", "planned", "does not fit")


@dataclass(frozen=True)
class Case:
    """One key, such as `train.epochs`, and one value; how it is given: `file`, `override` or `raw` YAML."""

    key: str
    name: str
    value: Any = dataclasses.field(repr=False, compare=False)
    how: str = "file"


def all_cases() -> list[Case]:
    """Return every key with every odd value and those of its own, in the file and as an override."""
    whole = (Case("", name, entry, "whole") for name, entry in WHOLE.items())
    return [*_cases("file"), *_cases("override"), *_cases("raw"), *whole]


def _cases(how: str) -> Iterator[Case]:
    for key in keys():
        values: dict[str, Any] = RAW if how == "raw" else {**ODD, **own_values(key)}
        yield from (Case(key.name, name, value, how) for name, value in values.items())


class Fuzz:
    """The judge of cases, in a folder, on top of a sound experiment."""

    def __init__(self, folder: Path, sound: dict[str, Any] | None = None) -> None:
        self.path, self.sound = folder / "experiment.yaml", sound or MINIMAL

    def run(self, case: Case) -> tuple[str, Experiment | None]:
        """Return the judgement of a case, within the time, and the experiment if it was taken."""
        with _in_time() as late:
            try:
                return self._judge(case)
            except _Late:
                return late, None
            except Exception:
                return f"traceback: {traceback.format_exc().splitlines()[-1][:300]}", None

    def _judge(self, case: Case) -> tuple[str, Experiment | None]:
        overrides = self._write(case)
        try:
            experiment = load_experiment(str(self.path), overrides)
        except UserError as refusal:
            if case.how == "whole" and case.value[0] == SAME:
                return f"wrongly refused: {refusal}", None
            return _refusal(str(refusal), case), None
        if case.how == "whole":
            is_same = case.value[0] == SAME and experiment.train.epochs == 3
            return "taken" if is_same else "another meaning: of the whole file", None
        section, _, name = case.key.partition(".")
        held = getattr(experiment, section)
        held = getattr(held, name) if name else held
        if not _means(case, held):
            return f"another meaning: {held!r}"[:200], None
        return "taken", experiment

    def _write(self, case: Case) -> list[str]:
        """Write the file, and return the overrides."""
        section, _, name = case.key.partition(".")
        content = copy.deepcopy(self.sound)
        if case.how == "whole":
            self.path.write_bytes(case.value[1])
        elif case.how == "override":
            self.path.write_text(yaml.safe_dump(content))
            return [f"--{case.key}={_as_text(case.value)}"]
        elif case.how == "file":
            (content.setdefault(section, {}) if name else content)[name or section] = case.value
            self.path.write_text(yaml.safe_dump(content, allow_unicode=case.name != "half a pair"))
        else:
            (content.setdefault(section, {}) if name else content)[name or section] = "HERE"
            self.path.write_text(yaml.safe_dump(content).replace("HERE", case.name))
        return []


def _refusal(text: str, case: Case) -> str:
    if len(text.splitlines()) != 1:
        return f"{len(text.splitlines())} lines: {text[:300]!r}"
    return "refused" if len(text) <= LONGEST + 2 * len(str(case.value)) else f"{len(text)} characters"


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _means(case: Case, held: Any) -> bool:
    """Tell whether the experiment holds the value that was given. Text may stand for a number, but not the reverse."""
    if case.how == "raw":
        return any(_is(meaning, held) for meaning in case.value)
    if case.how == "override":
        return held == _as_text(case.value) if isinstance(held, str) else _stands_for(case.value, held)
    return _stands_for(case.value, held)


def _is(given: Any, held: Any) -> bool:
    """Tell whether two plain values are one: an int may be held as a float."""
    if isinstance(held, bool) or isinstance(given, bool):
        return given is held
    if isinstance(held, float) and isinstance(given, (int, float)):
        return float(given) == held
    return type(given) is type(held) and given == held


def _stands_for(given: Any, held: Any) -> bool:
    if dataclasses.is_dataclass(held):
        return all(_stands_for(value, getattr(held, key)) for key, value in (given or {}).items())
    if isinstance(given, str) and not isinstance(held, str):
        if held is None:
            return given in ("null", "~")
        given = yaml.safe_load(given) if not given.lstrip("-").isdecimal() else int(given)
    return _is(given, held)


class _Late(BaseException):
    pass


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _Late


@contextlib.contextmanager
def _in_time() -> Iterator[str]:
    """Raise _Late inside after PATIENCE seconds of the processor, or LONGEST_WAIT of the clock."""
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, PATIENCE), signal.ITIMER_REAL: (signal.SIGALRM, LONGEST_WAIT)}
    for timer, (signum, seconds) in timers.items():
        signal.signal(signum, _stop)
        signal.setitimer(timer, seconds)
    try:
        yield "late"
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


class Plans:
    """`distill plan` on experiments that differ in one value; a simulation that is known is not made again."""

    def __init__(self) -> None:
        from distill.forecast.phases.simulator import Simulator
        from distill.recipes import plan

        kept: dict[str, Any] = {}

        class Kept(Simulator):
            """The one simulator of a card."""

            def __new__(cls, card: Any) -> Any:
                return kept.setdefault(card.name, super().__new__(cls))

            def __init__(self, card: Any) -> None:
                if not hasattr(self, "card"):
                    super().__init__(card)

            def __exit__(self, *_: object) -> None: ...

        self.simulators, self._plan, self._known = kept, plan, dict[str, str]()
        plan.Simulator = Kept  # type: ignore[misc]

    def of(self, experiment: Experiment) -> str:
        """Return `planned`, `does not fit`, `refused by plan`, or what is wrong."""
        if (key := repr(experiment)) not in self._known:
            self._known[key] = self._of(experiment)
        return self._known[key]

    def _of(self, experiment: Experiment) -> str:
        out = io.StringIO()
        with _in_time() as late, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                return "planned" if self._plan.main(experiment) == 0 else "does not fit"
            except UserError as refusal:
                lines = str(refusal).splitlines()
                return "refused by plan" if len(lines) == 1 else f"plan: {len(lines)} lines: {lines[:2]}"
            except _Late:
                for simulator in self.simulators.values():
                    simulator.close()
                return f"plan: {late}"
            except Exception as error:
                if (line := failures.explain(error)) is not None:  # as the command line does
                    return "refused by plan" if len(line.splitlines()) == 1 else f"plan: {line[:300]!r}"
                return f"plan: traceback: {traceback.format_exc().splitlines()[-1][:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder, sound, plans = Path(name), None, None
        if options.plan:
            from own_students import make_experiment

            sound = yaml.safe_load(Path(make_experiment(folder, preflight=True)).read_text())
            sound["student"] = {"options": {"layers": 1}}
            plans = Plans()
        fuzz = Fuzz(folder, sound)
        for case in all_cases()[:: options.every]:
            found, experiment = fuzz.run(case)
            if plans is not None and experiment is not None:
                found = plans.of(experiment)
            tally[found if found in FINE else found.split(":")[0]] += 1
            if found not in FINE:
                print(f"{case}: {found}", flush=True)
    print(f"{sum(tally.values())} cases: {', '.join(f'{number} {found}' for found, number in sorted(tally.items()))}")
    raise SystemExit(any(found not in FINE for found in tally))


if __name__ == "__main__":
    main()
