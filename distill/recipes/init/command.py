"""`distill init`: looks at card and data, asks what for, and writes an experiment file that fits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError, did_you_mean
from distill.forecast.machine.cards import find_card, this_machine
from distill.models.devices import pick_device
from distill.recipes.init.choices import GOALS, Goal, described
from distill.recipes.init.data import Data
from distill.recipes.init.proposal import Frame, Proposal, free_run_dir, propose
from distill.recipes.init.writing import experiment_text, write_new
from distill.system.memory import memory_of_host
from distill.system.progress import say
from distill.system.units import duration, parse_duration, size


@dataclass(frozen=True)
class Wishes:
    """The options of the command; None for those that were not given."""

    data: str | None = None
    goal: str | None = None
    card: str | None = None
    hours: str | None = None
    """A number of hours, or a time such as 90m."""
    teacher: str | None = None
    student: str | None = None
    to: str = "my.yaml"
    yes: bool = False
    """Ask nothing."""


def main(wishes: Wishes) -> int:
    """Write the experiment file `wishes.to`, and say what is in it. In a terminal, ask for what was not given.

    Raises UserError for a file that is there already, for data, models and cards that are unknown, and if nothing fits.
    """
    file = Path(wishes.to)
    _check_is_new(file)
    asks = not wishes.yes and sys.stdin.isatty()
    data = Data.look(_data(wishes, asks))
    goal = _goal(wishes, data, asks)
    hours = _hours(wishes.hours if wishes.hours is not None or not asks else _ask("hours at most", "no limit"))
    card = find_card(wishes.card) if wishes.card is not None else this_machine(pick_device("auto").type)
    where = "" if wishes.card is not None or not card.is_cuda else f", {size(memory_of_host())} of host memory"
    say(f"card: {card.name}, {size(card.memory_bytes)}{where}")
    say(data.described())
    frame = Frame(
        data, card, wishes.card is None, goal, hours, wishes.teacher, wishes.student, run_dir=free_run_dir(file)
    )
    proposal = propose(frame)
    text = experiment_text(proposal, data, card, GOALS[goal])
    _describe(proposal)
    if asks and not _ask(f"write it to {file}?", "yes").lower().startswith("y"):
        say("nothing was written")
        return 0
    write_new(file, text)
    on = "" if wishes.card is None else f" --card {wishes.card}"
    say(f"\nwritten: {file}. Next:\n  distill preview {file}\n  distill plan {file}{on}\n  distill run {file}")
    return 0


def _check_is_new(file: Path) -> None:
    if file.exists():
        raise UserError(f"--to {file}: is there already: choose another name, or remove it")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--to {file}: there is no folder {file.parent}: make it, or choose another place")


def _data(wishes: Wishes, asks: bool) -> str:
    if wishes.data is not None:
        return wishes.data
    if not asks:
        raise UserError("init: which data? Give a file, a folder or a hub data set: distill init --data chats.jsonl")
    return _ask("data (a file, a folder, or a hub data set)", "data/sotu.jsonl")


def _goal(wishes: Wishes, data: Data, asks: bool) -> Goal:
    """Return the goal that was asked for, else the one of the data's shape."""
    likely: Goal = "chat" if data.is_conversation else "text"
    if wishes.goal is None and asks:
        say("what for: " + "; ".join(f"{name}: {words}" for name, words in GOALS.items()))
    text = wishes.goal or (_ask("what for", likely) if asks else likely)
    for goal in GOALS:
        if text == goal:
            if goal == "chat" and data.tokens is not None and not data.is_conversation:
                raise UserError(f"--goal chat: {data.path} is {data.shape}: give conversations, or --goal text")
            return goal
    raise UserError(f"--goal {text}: unknown{did_you_mean(text, GOALS)}")


def _hours(text: str | None) -> float | None:
    if text is None or text == "no limit":
        return None
    try:
        hours = float(text)
    except ValueError:
        hours = parse_duration(text, "--hours") / 3600
    if not 0 < hours <= 10_000:
        raise UserError(f"--hours {text}: give a number of hours such as 8, or a time such as 90m")
    return hours


def _ask(question: str, default: str) -> str:
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        raise UserError("init: no answer; nothing was written (--yes asks nothing)") from None


def _describe(proposal: Proposal) -> None:
    """Print the proposal: models, amounts, time and place."""
    experiment, forecast = proposal.experiment, proposal.forecast
    who = described(experiment.student, proposal.teacher_parameters)
    millions = f"{proposal.teacher_parameters / 1e6:,.0f} M parameters"
    say(f"\nteacher: {experiment.teacher.model}, {millions}, {experiment.teacher.quantization}")
    say(f"student: {who}{'; a control beside it' if experiment.evaluate.control else ''}")
    if forecast.training is not None:
        say(f"training: {forecast.training.described()}")
        for line in forecast.training.shortcomings():
            say(f"- {line}")
    phases = [
        f"{name} {size(phase.needed_bytes)}{'' if phase.seconds is None else f', {duration(phase.seconds)}'}"
        for name, phase in forecast.phases.items()
    ]
    say(f"forecast: {'; '.join(phases)}; {duration(proposal.seconds)} in all")
    disk = sum(held for held in forecast.disk.values() if held is not None)
    say(f"disk: {size(disk)}, {size(forecast.free_disk_bytes)} are free here")
