"""`distill init` for each card of configs/, its teacher and odd data; phases are estimated by a formula, not simulated.

`tests/benchmarks/init_cards.py` does it with the real forecasts, which take a minute a card.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.forecast.phases.simulator import Piece, Simulator
from distill.forecast.published import published_models
from distill.forecast.simulation.result import Simulation
from distill.recipes import plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("*-*gb.yaml"), *CONFIGS.glob("*-t4.yaml")])


def student_parameters(experiment: Experiment) -> int:
    student = experiment.student
    if "config" in student.options:
        return 300_000_000
    return student.search["parameters"] if student.search else published_models()[student.options["model"]].parameters


def estimated(self: Simulator, experiment: Experiment, phase: str, notes: list[str]) -> list[Piece]:
    """Return the pieces of a phase by rules of thumb: bytes a parameter, and bytes a token of a pass."""
    teacher, train, length = experiment.teacher, experiment.train, experiment.corpus.sequence_length
    streamed, bits = teacher.class_path == "streamed", {"nf4": 0.6, "int8": 1.1, "none": 2.0}[teacher.quantization]
    micro_batch = teacher.options.get("micro_batch", experiment.cache.batch_size)
    reading = 2e9 if streamed else bits * published_models()[str(teacher.model)].parameters
    reading += micro_batch * length * 2e5
    own = student_parameters(experiment)
    moments = {"adamw": 8, "adamw_8bit": 2}[train.optimizer]
    each = 4 + moments / 2 if train.precision == "bf16-true" else 8 + moments
    tokens = train.batch_size * length * (4e4 if train.activation_checkpointing else 2e5)
    peak = {"train-student": own * each + tokens + 1e9, "cache-teacher": reading}.get(phase, max(reading, 4 * own))
    sizes: dict[str, int] = Counter({"parameters": own, "trained_parameters": own, "bytes": 4 * own})
    return 2 * [Piece(phase, Simulation(int(peak), {"weights": int(peak)}, Counter()), 0.1, sizes)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Simulator, "pieces", estimated)
    monkeypatch.setattr(plan, "check_student_ahead", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)


def rows(number: int, words: int = 20) -> str:
    """Return conversations as lines of JSON."""
    turn = " ".join(["word"] * words)
    each = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": turn}]
    return "".join(json.dumps({"messages": each}) + "\n" for _ in range(number))


AMOUNTS = [(file, 300) for file in FILES] + [(FILES[-1], 2), (FILES[-1], 30_000)]


@pytest.mark.parametrize(("file", "number"), AMOUNTS, ids=lambda value: getattr(value, "stem", value))
def test_each_card_gets_a_file_that_fits_it(file: Path, number: int, distill: Any) -> None:
    card, teacher = file.stem.rpartition("-")[2], str(load_experiment(str(file), []).teacher.model)
    Path("chats.jsonl").write_text(rows(number, 200 if number > 300 else 20))
    distill("init", "--yes", "--data", "chats.jsonl", "--card", card, "--teacher", teacher).done()
    experiment = load_experiment("my.yaml", [])
    found = plan.planned(experiment, card).forecast
    assert found.fits and not found.failures and experiment.teacher.model == teacher
    assert min(map(found.spare_bytes, found.phases)) >= 0.7e9
    assert student_parameters(experiment) < 0.7 * published_models()[teacher].parameters
    has_smaller = experiment.student.class_path == "huggingface"
    assert has_smaller or number > 300 or not list_smaller(teacher), "little text is for a student that can speak"
    assert experiment.train.batch_size * experiment.train.accumulate_grad_batches >= 1


def list_smaller(teacher: str) -> list[str]:
    facts = published_models()[teacher]
    return [
        name
        for name, model in published_models().items()
        if model.tokens == facts.tokens and model.parameters < 0.6 * facts.parameters
    ]


@pytest.mark.parametrize(("goal", "card"), [("draft", "rtx-3060"), ("chat", "t4"), ("text", "24gb"), (None, "6gb")])
def test_without_a_teacher_the_largest_that_suits_is_taken(goal: str | None, card: str, distill: Any) -> None:
    Path("chats.jsonl").write_text(rows(300))
    own = ["--goal", goal] if goal else []
    said = distill("init", "--yes", "--data", "chats.jsonl", "--card", card, "--hours", "8", *own).done().out
    experiment = load_experiment("my.yaml", [])
    found = plan.planned(experiment, card).forecast
    assert found.fits and published_models()[str(experiment.teacher.model)].names[0].startswith(("Qwen/", "Hugging"))
    assert "training:" in said and "forecast:" in said
    assert sum(phase.seconds or 0 for phase in found.phases.values()) <= 8 * 3600


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ("empty.jsonl",)),
        ("one.jsonl", rows(1).encode(), ("one document", "split it")),
        ("broken.jsonl", b"{\n{\n", ("broken.jsonl", "none of its first rows")),
        ("numbers.jsonl", b'{"a": 1}\n{"a": 2}\n', ("columns a", "none is known")),
        ("latin.txt", "Stra\xdfe ".encode("latin-1") * 50, ("latin.txt",)),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(100), ("picture.png",)),
        ("folder/none.md.bak", b"text", ("folder",)),
    ],
)
def test_odd_data_are_told_in_a_line(name: str, content: bytes, words: tuple[str, ...], distill: Any) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    data = path.parts[0]
    teacher = ["--teacher", "HuggingFaceTB/SmolLM2-1.7B-Instruct"]
    distill("init", "--yes", "--data", data, "--card", "rtx-3060", *teacher).refused(*words)
    assert not Path("my.yaml").exists()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("1GiB", ("1 GiB card",)),
        ("rtx-9999", ("rtx-9999",)),
        ("0", ("0",)),
        ("-4GiB", ("-4GiB",)),
        ("lots", ("lots",)),
    ],
)
def test_a_card_that_is_none_or_too_small_is_told_in_a_line(card: str, words: tuple[str, ...], distill: Any) -> None:
    Path("chats.jsonl").write_text(rows(300))
    teacher = ["--teacher", "Qwen/Qwen3-8B"]
    distill("init", "--yes", "--data", "chats.jsonl", f"--card={card}", *teacher).refused(*words)
    assert not Path("my.yaml").exists()
