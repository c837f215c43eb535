"""The one sentence that a reader remembers: computed, and plain if the student is no better than its control."""

from __future__ import annotations

from distill.report.benchmarks import mean_recovery
from distill.report.facts import RunFacts
from distill.report.held_out import kl_scope
from distill.report.metrics import reading_of
from distill.report.numbers import SPACE, interval, nats, probability, times, whole_share, with_sign
from distill.report.steadiness import unsteady

MEANT_BY_CONTROL = "the control, which learned from the text alone"


def verdict(facts: RunFacts) -> str:
    """Return the measurements in a sentence, bad news first. It leaves out anything that was not measured."""
    size, against = _size(facts), _no_better(facts)
    fidelity = _fidelity(facts, "it" if size else "the teacher")
    speed = _speed(facts, "" if size or against or fidelity else " than the teacher")
    if against:
        clauses = [f"The student is {against}"]
        rest = _joined([clause for clause in (size, speed) if clause])
        if rest:
            clauses.append(f"it {rest}")
    else:
        parts = [clause for clause in (size, fidelity, speed) if clause]
        clauses = [f"The student {_joined(parts)}"] if parts else []
    benchmarks = _benchmarks(facts)
    if benchmarks:
        clauses.append(benchmarks if clauses else benchmarks[0].upper() + benchmarks[1:])
    if not clauses:
        return "Not measured yet: distill evaluate holds the student against its teacher."
    return "; ".join(clauses) + "."


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}" if parts else ""


def _size(facts: RunFacts) -> str:
    ratio = facts.ratio("parameters")
    return "" if ratio is None else f"has {whole_share(ratio)} of the teacher's parameters"


def _fidelity(facts: RunFacts, teacher: str) -> str:
    student, control = facts.of("fidelity", "student").get("kl"), facts.of("fidelity", "control").get("kl")
    if student is None:
        return ""
    text = f"keeps a KL of {short(student)} nats/token from {teacher}{kl_scope(facts.section('text'))}"
    test = facts.of("student_against_control", "kl")
    beside = []
    if control is not None:
        beside.append(f"control {short(control)}")
    if test:
        beside.append(f"difference {with_sign(short(test['difference']))}")
    if "p" in test:
        beside.append(f"p {probability(test['p'])}")
    return text + (f" ({', '.join(beside)})" if beside else "")


def _no_better(facts: RunFacts) -> str:
    """Return a clause that says the student's KL is no better than the control's; empty if it is better."""
    student, control = facts.of("fidelity", "student").get("kl"), facts.of("fidelity", "control").get("kl")
    test = facts.of("student_against_control", "kl")
    reading = reading_of(test, "lower") if test else ""
    is_less = student is None or control is None or student < control
    if reading == "better" or (reading in ("", "not tested") and is_less):
        return ""
    start = "worse than" if reading == "worse" else "no better than"
    values = "" if student is None or control is None else f" {short(student)} against {short(control)} nats/token"
    details = []
    if test:
        details.append(f"difference {with_sign(short(test['difference']))}")
    if "interval" in test:
        details.append(f"95{SPACE}% interval {interval(test['interval'], lambda value: with_sign(short(value)))}")
    if "p" in test:
        details.append(f"p {probability(test['p'])}")
    compared = f"KL from the teacher{kl_scope(facts.section('text'))}{values}"
    return f"{start} {MEANT_BY_CONTROL}: {', '.join([compared, *details])}"


def _speed(facts: RunFacts, than: str) -> str:
    if unsteady(facts.section("cost")):
        return ""
    speeds = facts.of("cost", "student").get("decode", {})
    ratios = {size: facts.ratio("cost", "decode", size) for size in sorted(speeds, key=_as_number)}
    ratio = next((ratio for ratio in ratios.values() if ratio), None)
    if ratio is None:
        return ""
    if 0.95 <= ratio <= 1.05:
        return "generates as fast as the teacher"
    return f"generates {times(ratio)} faster{than}" if ratio > 1 else f"generates {times(1 / ratio)} slower{than}"


def _as_number(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")


def _benchmarks(facts: RunFacts) -> str:
    found = mean_recovery(facts.section("benchmarks"), "student")
    if found is None:
        return ""
    if not found.clear:
        return f"on {_benchmark_count(found.tasks)} the teacher itself is not clearly above chance"
    where = _benchmark_count(found.tasks)
    recovered = f"it recovers {whole_share(found.recovery)} of"
    if found.clear < found.tasks:
        return f"on the {found.clear} of {where} where the teacher is clearly above chance, {recovered} that margin"
    return f"on {where} {recovered} the teacher's margin above chance"


def _benchmark_count(tasks: int) -> str:
    return f"{tasks} benchmark{'s' if tasks != 1 else ''}"


def short(value: float) -> str:
    """Write nats for running text: two decimals if that says enough."""
    return (
        nats(value)
        if abs(value) < 0.1
        else nats(round(value, 2)).removesuffix("0")
        if abs(value) < 100
        else nats(value)
    )
