"""`distill init`: the file that it writes fits, says so in comments, reads back the same, and overwrites nothing."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.errors import UserError
from distill.experiment.configuration import Experiment, TrainConfig
from distill.experiment.file import load_experiment
from distill.experiment.teacher_sections import CacheConfig, CorpusConfig, TeacherConfig
from distill.forecast.machine.cards import find_card
from distill.recipes import plan
from distill.recipes.init import choices, command, data, proposal, writing
from distill.recipes.init.data import Data, held_out_share

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(world: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    return str(world.save_teacher(folder / "llama", "llama", num_hidden_layers=6, intermediate_size=256))


@pytest.fixture
def init(distill: Any, world: Any, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`init("--hours", 1)`: the command for the world's corpus and a tiny teacher, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    corpus = world.content["corpus"]["path"]
    return lambda *more: distill("init", "--yes", "--data", corpus, "--teacher", teacher, *more)


def test_the_file_fits_has_comments_and_is_what_was_said(init: Any) -> None:
    outcome = init("--card", "rtx-3060", "--hours", "2h").done()
    experiment = load_experiment("my.yaml", [])
    assert (experiment.student.class_path, experiment.run_dir) == ("pruned", "runs/my")
    assert experiment.corpus.sequence_length == 256, "no longer than the teacher reads"
    assert experiment.student.options == {"calibration_samples": 2}, "there are about 11 samples"
    assert experiment.train.epochs == 4 and experiment.cache.threshold == 0.01
    assert "40 rows of plain text" in outcome.out and "few tokens" in outcome.out
    planned = plan.planned(experiment, "rtx-3060").forecast
    assert min(map(planned.spare_bytes, planned.phases)) >= 0.7e9, "as the experiments for cards"
    assert planned.fits and not planned.failures and planned.training is not None
    assert f"training: {planned.training.described()}" in outcome.out
    lines = [line for line in Path("my.yaml").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 25 and [line for line in lines if not line.endswith(":") and " # " not in line] == []
    before = Path("my.yaml").read_bytes()
    init("--card", "rtx-3060").refused("my.yaml", "is there already")
    assert Path("my.yaml").read_bytes() == before


def test_from_chats_to_an_answer_by_llama_cpp_in_five_commands(
    init: Any, distill: Any, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
    ask = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}, as far as I know."} for n in range(40)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ask))
    init("--data", "chats.jsonl", "--card", "rtx-3060", "--student", "90k").done()
    small = ["--cache.max_samples", 8, "--cache.held_out_samples", 4, "--train.max_steps", 2, "--preflight", "false"]
    quick = ["--evaluate.max_samples", 4, "--evaluate.cost", "false", "--evaluate.texts", 0]
    quick += ["--student.search", "{parameters: 90k, candidates: 2, steps: 1}", "--evaluate.control", "false"]
    assert "pairs of prompt and completion" in distill("preview", "my.yaml").done().out
    distill("run", "my.yaml", *small, *quick).done()
    exported = distill("export", "runs/my", "--to", "gguf", "--format", "gguf", "--type", "f16").done()
    assert len(list(Path("gguf").glob("*.gguf"))) == 1 and "llama.cpp" in exported.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 and 3?\n"))
    said = distill("chat", "gguf", "--temperature", 0, "--max_new_tokens", 8).done().out
    assert "by llama.cpp" in said and "answers;" in said, "it has its chat template, and is no mere continuation"


def test_the_hours_are_used_whatever_the_passes_of_a_step() -> None:
    """A step of 8 samples takes 4 s and a batch of 2 of the teacher 1 s: a sample takes 0.5 s + 1.5 · 0.5 s."""
    experiment = Experiment(
        CorpusConfig("owner/name"),
        TeacherConfig("teacher"),
        cache=CacheConfig(batch_size=2),
        train=TrainConfig(batch_size=1, accumulate_grad_batches=8),
    )
    seconds = {"cache-teacher": SimpleNamespace(seconds_each=1.0), "train-student": SimpleNamespace(seconds_each=4.0)}
    forecaster = SimpleNamespace(forecast=lambda changed: SimpleNamespace(phases=seconds))
    frame = proposal.Frame(
        Data("owner/name", None, None, "", False), find_card("8GiB"), False, "text", 10.0, None, None, "runs/a"
    )
    samples, epochs = proposal._within_hours(frame, forecaster, experiment, 100_000)  # type: ignore[arg-type]
    assert (samples, epochs) == (int(36_000 / 1.25), 1)


def test_hours_that_do_not_suffice_are_said_before_a_file_is_there(init: Any) -> None:
    init("--card", "8GiB", "--hours", "0.0000001", "--student", "90k").refused("--hours", "give more hours")
    assert not Path("my.yaml").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--goal", "poems"], ("--goal poems", "chat")),
        (["--goal", "chat"], ("is plain text", "--goal text")),
        (["--hours", "soon"], ("--hours",)),
        (["--hours", "-3"], ("--hours -3",)),
        (["--card", "rtx-3061"], ("rtx-3061", "RTX 3060")),
        (["--student", "compact"], ("--student compact", "60M")),
        (["--to", "no/folder.yaml"], ("no folder",)),
        (["--data", "nowhere.jsonl"], ("nowhere.jsonl", "no such file")),
    ],
)
def test_a_mistake_is_one_line(init: Any, more: list[str], words: tuple[str, ...]) -> None:
    init(*(["--card", "12GiB"] if "--card" not in more else []), *more).refused(*words)


def test_without_data_it_asks_only_in_a_terminal(distill: Any) -> None:
    distill("init", "--yes").refused("which data")


def test_a_terminal_is_asked_what_was_not_given(distill: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    frames: list[Any] = []
    answers = iter([world.content["corpus"]["path"], "draft", "3"])

    def answer(question: str) -> str:
        asked.append(question.split(" [")[0].split(" (")[0])
        return next(answers)

    def propose(frame: Any) -> Any:
        frames.append(frame)
        raise UserError("enough")

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command, "propose", propose)
    distill("init", "--card", "12GiB").refused("enough")
    assert asked == ["data", "what for", "hours at most"]

    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    distill("init", "--card", "12GiB").refused("no answer", "--yes")
    (frame,) = frames
    assert (frame.goal, frame.hours, frame.is_here, frame.teacher) == ("draft", 3.0, False, None)


def test_data_are_told_by_their_rows(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"question": f"How {n}?", "answer": "So."}) + "\n" for n in range(30)))
    found = Data.look(str(chats))
    assert (found.rows, found.is_conversation, found.shape) == (30, True, "pairs of prompt and completion")
    assert held_out_share(found, 300) == round(5 / 30, 3), "a few documents at least, for they are chosen by a hash"
    assert held_out_share(replace(found, rows=None), 10**6) == 0.002
    one = tmp_path / "one.txt"
    one.write_text("Only one document.")
    with pytest.raises(UserError, match=r"one\.txt: is one document"):
        Data.look(str(one))
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(UserError, match="columns body, and none is known"):
        Data.look(str(other))
    assert Data.look("owner/name").tokens is None, "the hub is not asked"


@pytest.mark.parametrize(
    ("card", "goal", "first"),
    [
        ("rtx-3060", "chat", "Qwen/Qwen3-8B"),
        ("rtx-3060", "text", "Qwen/Qwen3-8B-Base"),
        ("rtx-3090", "draft", "Qwen/Qwen3-14B"),
        ("6GiB", "text", "Qwen/Qwen3-1.7B-Base"),
    ],
)
def test_the_largest_open_teacher_comes_first(card: str, goal: Any, first: str) -> None:
    names = choices.teachers(find_card(card), goal)
    assert names[0] == first and len(names) > 2
    sizes = [next(m.parameters for n, m in choices.published_models().items() if n == name) for name in names]
    assert sizes == sorted(sizes, reverse=True)


def test_students_grow_smaller_and_end_with_a_published_one() -> None:
    found = list(choices.students(None, "meta-llama/Llama-3.1-70B", 70_000_000_000, find_card("24GiB"), "text"))
    sizes = [student.search["parameters"] for student in found if student.search]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= choices.largest_student(find_card("24GiB"))
    models = [student.options["model"] for student in found if "model" in student.options]
    assert models[-1] == "meta-llama/Llama-3.2-1B"
    assert found[-1].options["config"]["model_type"] == "llama", "if nothing else fits, one that begins from nothing"
    few = next(choices.students(None, "Qwen/Qwen3-8B", 8_000_000_000, find_card("12GiB"), "chat", 20_000))
    assert few.options == {"model": "Qwen/Qwen3-0.6B"}, "so little text teaches only a student that can speak"
    much = next(choices.students(None, "Qwen/Qwen3-8B", 8_000_000_000, find_card("12GiB"), "chat", 2_000_000_000))
    assert much.class_path == "pruned"
    (own,) = choices.students("my/model", "teacher", 10**9, find_card("24GiB"), "text")
    assert own.options == {"model": "my/model"}


def test_all_keys_of_the_comments_exist() -> None:
    from distill.experiment import configuration

    for key in [*writing._ALWAYS, *writing._LEVERS]:
        section, _, name = key.partition(".")
        kind = getattr(configuration, f"{section.capitalize()}Config", None)
        assert name in kind.__dataclass_fields__ if kind else key == "run_dir"
    assert data.MOST_ROWS > 1000
