"""The evaluation's tables for a terminal or a log."""

from __future__ import annotations

from typing import Any

from distill.losses.plausibility import implausible
from distill.report.held_out import about_amount, kl_scope
from distill.report.schema import RESAMPLED
from distill.report.steadiness import about_rounds
from distill.system import units

MODELS = ("teacher", "before", "student", "control")


def print_tables(result: dict[str, Any]) -> None:
    """Print what evaluation.json has: fidelity, benchmarks, speed; each model a row or a column."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 110)
    console.print(_fidelity(result))
    text, found = result["text"], result["fidelity"]
    console.print(about_amount(text), soft_wrap=True)
    for name in found.keys() - {"teacher"}:
        if doubt := implausible(name, found[name]["nll"], found["teacher"]["nll"]):
            console.print(f"{doubt}", soft_wrap=True)
    if "dropped_mass" in text:
        console.print(
            f"over the tokens that the students have: {text['dropped_mass']:.2%} of the teacher's probability is on "
            f"others; {text['left_out_samples']} samples with others in them are left out",
            soft_wrap=True,
        )
    if "kl" in result.get("student_against_control", {}):
        against = result["student_against_control"]["kl"]
        console.print(
            f"KL, student minus control: {against['difference']:+.3f} (p = {against['p']:.2g}{_resampled(text)})"
        )
    for each in result.get("rounds", []):
        own = f", of its own texts {each['own_kl']:.3f}" if "own_kl" in each else ""
        console.print(f"round {each['round']}: KL of held-out text {each['held_out_kl']:.3f}{own}")
    for name in [name for name in MODELS if name in result.get("own_texts", {})]:
        console.print(_own_texts(name, result["own_texts"][name]), soft_wrap=True)
    for kind, spread in result.get("seeds", {}).items():
        kl = spread["kl"]
        console.print(f"KL, {kind}: {kl['mean']:.3f} ± {kl['deviation']:.3f} over {len(kl['values'])} seeds")
    if result.get("benchmarks"):
        console.print(_benchmarks(result["benchmarks"]))
    if result.get("cost"):
        console.print(_cost(result["cost"]))
        if rounds := about_rounds(result["cost"]):
            console.print(rounds, soft_wrap=True)


def _fidelity(result: dict[str, Any]) -> Any:
    from rich.table import Table

    scope = kl_scope(result["text"])
    table = Table(title=f"on {result['text']['tokens']:,} held-out positions (nats; KL is teacher || student{scope})")
    table.add_column("model")
    for heading in ("parameters", "nll", "perplexity", "KL", "top-1 agreement", "acceptance", "ECE"):
        table.add_column(heading, justify="right")
    for name in MODELS:
        row = result["fidelity"].get(name)
        if row is None:
            continue
        beside = ("", "", "")
        if "kl" in row:
            beside = (f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}", f"{row['acceptance']:.1%}")
        size = f"{result['parameters'][name] / 1e6:,.1f} M"
        perplexity = f"{row['perplexity']:.1f}" if "perplexity" in row else "–"
        table.add_row(name, size, f"{row['nll']:.3f}", perplexity, *beside, f"{row['ece']:.1%}")
    return table


def _own_texts(name: str, own: dict[str, Any]) -> str:
    """Return the figures of a model's own texts in a line."""
    said = [f"{own['ended']:.0%} ended", f"repetition {own['repetition']:.1%}"]
    if "kl" in own:
        said.insert(0, f"KL {name} || teacher {own['kl']:.3f}")
    if "exact_match" in own:
        said += [f"exact match {own['exact_match']:.1%}", f"token F1 {own['token_f1']:.1%}"]
    named = {"valid_json": "valid JSON", "metric": "metric"}
    said += [f"{words} {own[key]:.3g}" for key, words in named.items() if key in own]
    return f"{own['texts']:,} texts of the {name}: {', '.join(said)}"


def _resampled(text: dict[str, Any]) -> str:
    """Say how many documents or samples are behind a p."""
    found = [f"{text[key]:,} {key.removeprefix('resampled_')}" for key in RESAMPLED if key in text]
    return f" of {found[0]}" if found else ""


def _benchmarks(benchmarks: dict[str, Any]) -> Any:
    from rich.table import Table

    names = [name for name in MODELS if name in benchmarks]
    table = Table(title="benchmarks (± standard error)")
    table.add_column("task")
    for heading in ("metric", "documents", *names, "chance"):
        table.add_column(heading, justify="right" if heading != "metric" else "left")
    for task in {task: None for name in names for task in benchmarks[name]}:
        found = {name: benchmarks[name][task] for name in names if task in benchmarks[name]}
        one = next(iter(found.values()))
        scores = [_score(found[name]) if name in found else "" for name in names]
        chance = f"{one['chance']:.3f}" if "chance" in one else ""
        table.add_row(task, one["metric"], f"{one['documents']:,}", *scores, chance)
    return table


def _score(found: dict[str, Any]) -> str:
    score = found["metrics"].get(found["metric"])
    if score is None:
        return "–"
    error = score.get("stderr")
    return f"{score['value']:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _cost(cost: dict[str, Any]) -> Any:
    from rich.table import Table

    names = [name for name in MODELS if name in cost]
    table = Table(title="speed on this machine (tokens a second) and size")
    table.add_column("model")
    sizes = list(cost[names[0]]["prefill"])
    for heading in (*(f"prefill x{size}" for size in sizes), *(f"decode x{size}" for size in sizes), "on disk"):
        table.add_column(heading, justify="right")
    for name in names:
        speeds = [cost[name][phase].get(size) for phase in ("prefill", "decode") for size in sizes]
        shown = [f"{speed:,.0f}" if speed else "out of memory" for speed in speeds]
        table.add_row(name, *shown, units.size(cost[name]["bytes_on_disk"]))
    return table
