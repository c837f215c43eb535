"""`distill evaluate`: measured once for the same inputs, and refused where there is nothing sound to measure."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.report import page as report_page


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Any:
    """A copy of the finished run without its evaluation: `run(file's overrides)` as a list of arguments."""
    shutil.copytree(
        finished.run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json", "measured.jsonl", "cache")
    )
    return [*finished.elsewhere(tmp_path / "run")]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def measured(folder: Path) -> dict[str, Any]:
    """Return an evaluation's results, without the experiment file."""
    return {key: value for key, value in read(folder).items() if key != "experiment"}


def test_it_needs_no_cache_and_repeats_to_the_last_bit(run: Any, finished: Any, distill: Any, tmp_path: Path) -> None:
    distill("evaluate", *run, "--cache.dir", tmp_path / "none").done()
    assert measured(tmp_path / "run") == measured(finished.run)


def test_neither_batch_nor_chunk_changes_what_is_measured(
    run: Any, finished: Any, distill: Any, tmp_path: Path
) -> None:
    distill("evaluate", *run, "--evaluate.batch_size", 3, "--loss.chunk_size", 7).done()
    ours, theirs = read(tmp_path / "run"), read(finished.run)
    assert ours["text"] == theirs["text"]
    for role in ("before", "student", "control"):
        mine, other = (
            {name: value for name, value in result["fidelity"][role].items() if isinstance(value, float)}
            for result in (ours, theirs)
        )
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_students_are_measured_in_the_type_asked_for(run: Any, finished: Any, distill: Any, tmp_path: Path) -> None:
    """Another rounding of the same weights, and no other teacher."""
    distill("evaluate", *run, "--evaluate.student_dtype", "bfloat16").done()
    ours, theirs = (read(folder)["fidelity"] for folder in (tmp_path / "run", finished.run))
    assert ours["teacher"] == theirs["teacher"]
    for role in ("before", "student", "control"):
        assert ours[role]["kl"] == pytest.approx(theirs[role]["kl"], rel=0.02, abs=2e-3)
        assert ours[role]["kl"] != theirs[role]["kl"]
    again = distill("evaluate", *run, "--evaluate.student_dtype", "bfloat16").done()
    assert "nothing to do" in again.out
    assert "nothing to do" not in distill("evaluate", *run).done().out
    assert read(tmp_path / "run")["fidelity"]["student"] == theirs["student"]


def test_other_inputs_are_measured_anew(run: Any, distill: Any, tmp_path: Path) -> None:
    distill("evaluate", *run, "--evaluate.max_samples", 4, "--evaluate.control", "false").done()
    fewer = read(tmp_path / "run")
    assert 0 < fewer["text"]["tokens"] < 4 * 48 and "control" not in fewer["fidelity"]
    again = distill("evaluate", *run, "--evaluate.max_samples", 4, "--evaluate.control", "false")
    assert "nothing to do" in again.done().out and "│ student" in again.out
    more = distill("evaluate", *run, "--evaluate.max_samples", 8, "--evaluate.control", "false")
    assert "nothing to do" not in more.done().out
    assert read(tmp_path / "run")["text"]["tokens"] > fewer["text"]["tokens"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"made_from": {'])
def test_a_damaged_evaluation_is_written_again(finished: Any, distill: Any, tmp_path: Path, content: str) -> None:
    """It is a view: what was measured lies line by line beside it."""
    shutil.copytree(finished.run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "run/evaluation.json").write_text(content)
    assert "nothing to do" in distill("evaluate", *finished.elsewhere(tmp_path / "run")).done().out
    assert measured(tmp_path / "run") == measured(finished.run)


@pytest.mark.parametrize("page", ["report.html", "report.md"])
def test_a_process_that_dies_among_its_last_files_leaves_no_page_of_other_figures(
    finished: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """Each page is written after evaluation.json; the next start writes what the one that died did not."""
    shutil.copytree(finished.run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    real = report_page.write_durably

    def die(path: Path, content: bytes) -> None:
        if path.name == page:
            raise KeyboardInterrupt
        real(path, content)

    command = ["evaluate", *finished.elsewhere(tmp_path / "run"), "--evaluate.max_samples", 3]
    with monkeypatch.context() as patch:
        patch.setattr(report_page, "write_durably", die)
        assert distill(*command).status == 130
    assert len(read(tmp_path / "run")["fidelity"]) and not (tmp_path / "run/report.html").exists()
    distill(*command).done()
    found = [(tmp_path / "run" / name).read_bytes() for name in ("report.html", "report.md")]
    report_page.write_report(tmp_path / "run")
    assert found == [(tmp_path / "run" / name).read_bytes() for name in ("report.html", "report.md")]


def test_a_measurement_of_which_a_part_is_missing_is_made_again(run: Any, distill: Any, tmp_path: Path) -> None:
    """A power cut may leave any beginning of the last line; a stranger's line is none."""
    fewer = ["--evaluate.max_samples", 1, "--evaluate.control", "false"]
    distill("evaluate", *run, *fewer).done()
    path, before = tmp_path / "run/measured.jsonl", measured(tmp_path / "run")
    whole = path.read_bytes()
    for left in (whole[:100], whole[:-1], whole[:-30], b'3\n{"key": 1}\n' + whole[:-2]):
        path.write_bytes(left)
        again = distill("evaluate", *run, *fewer).done()
        assert ("nothing to do" in again.out) == (left == whole[:-1])
        assert measured(tmp_path / "run") == before


def test_a_changed_digit_of_a_measurement_is_measured_again(run: Any, distill: Any, tmp_path: Path) -> None:
    fewer = ["--evaluate.max_samples", 1, "--evaluate.control", "false"]
    distill("evaluate", *run, *fewer).done()
    path, before = tmp_path / "run/measured.jsonl", measured(tmp_path / "run")
    whole = path.read_bytes()
    line = max(whole.splitlines(), key=len)
    digit = re.search(rb"\.\d*?([1-8])", line)
    assert digit
    changed = line[: digit.start(1)] + b"9" + line[digit.end(1) :]
    path.write_bytes(whole.replace(line, changed))
    assert "nothing to do" not in distill("evaluate", *run, *fewer).done().out
    assert measured(tmp_path / "run") == before


def test_another_code_of_a_students_class_is_another_student(finished: Any, distill: Any, tmp_path: Path) -> None:
    source = (Path(__file__).parents[3] / "students/compact.py").read_text()
    (tmp_path / "own.py").write_text(source)
    own = [*finished.elsewhere(tmp_path / "run"), "--student.class_path", tmp_path / "own.py:CompactDecoder"]
    own += ["--student.options", "{hidden_size: 16, layers: 1, heads: 2}", "--evaluate.control", "false"]
    distill("train-student", *own, "--train.max_steps", 2).done()
    once = ["evaluate", *own, "--train.max_steps", 2, "--evaluate.max_samples", 1]
    distill(*once).done()
    assert "nothing to do" in distill(*once).done().out
    (tmp_path / "own.py").write_text(source + "\nCHANGED = True\n")
    assert "nothing to do" not in distill(*once).done().out


def test_what_the_student_was_trained_on_is_not_held_out(run: Any, distill: Any) -> None:
    distill("evaluate", *run, "--corpus.held_out", 0.5).refused("held out 0.2", "held out 0.5", "corpus.held_out")


def test_what_the_beginning_depends_on_is_an_input(run: Any, distill: Any) -> None:
    """Students look at the first samples of the cache while they are made."""
    fewer = ["--evaluate.max_samples", 1, "--evaluate.control", "false"]
    distill("evaluate", *run, *fewer).done()
    assert "nothing to do" in distill("evaluate", *run, *fewer).done().out
    assert "nothing to do" not in distill("evaluate", *run, *fewer, "--cache.max_samples", 3).done().out


def test_before_training_there_is_nothing_to_evaluate(finished: Any, distill: Any, tmp_path: Path) -> None:
    outcome = distill("evaluate", *finished.elsewhere(tmp_path / "run"))
    outcome.refused(str(tmp_path / "run/student"), "no trained student", "distill train-student")


def test_without_held_out_text_there_is_nothing_to_evaluate(run: Any, distill: Any) -> None:
    distill("evaluate", *run, "--corpus.held_out", 0).refused("held out 0.2", "corpus.held_out")


def test_a_student_of_another_make_is_refused(run: Any, distill: Any) -> None:
    """`before` is made from the experiment: with another student it would not be the trained one's beginning."""
    outcome = distill("evaluate", *run, "--student.options", "{layers: 3}")
    outcome.refused("was trained with other settings", "student.options.layers: 2 there, 3 here")
    distill("evaluate", *run, "--train.seed", 5).refused("train.seed: 0 there, 5 here")
    distill("evaluate", *run, "--train.learning_rate", 1).refused("train.learning_rate: 0.005 there, 1.0 here")
    distill("evaluate", *run, "--loss.alpha", 1).refused("alpha: 0.0 there, 1.0 here")


def test_a_teacher_of_another_vocabulary_is_refused(run: Any, make_teacher: Any, distill: Any) -> None:
    larger = make_teacher("llama", vocabulary=500)
    distill("evaluate", *run, "--teacher.model", larger).refused("run/student was trained", f"{larger} here")


def test_a_damaged_student_folder_is_refused(run: Any, distill: Any, tmp_path: Path) -> None:
    (tmp_path / "run/student/model.safetensors").unlink()
    distill("evaluate", *run).refused("run/student", "model.safetensors")
    (tmp_path / "run/student/settings.json").unlink()
    distill("evaluate", *run).refused("run/student", "settings.json")
