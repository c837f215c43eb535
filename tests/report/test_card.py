"""report.md is a model hub's card: it names no machine, its words are words, and what someone wrote in it stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.report.markdown import fenced, hub_name, text
from distill.report.page import write_report


def reached(change: Callable[[bytes], bytes], run: Path) -> bytes:
    """report.md after someone changed it, and evaluation.json changed too."""
    _, card = write_report(run)
    card.write_bytes(change(card.read_bytes()))
    content = json.loads((run / "evaluation.json").read_text())
    content["fidelity"]["student"]["kl"] = 1.23456
    (run / "evaluation.json").write_text(json.dumps(content))
    page, _ = write_report(run)
    assert "1.235" in page.read_text(encoding="utf-8"), "the page is always written anew"
    return card.read_bytes()


def test_a_card_that_nobody_changed_is_written_anew(
    fake_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert b"1.235" in reached(lambda card: card, fake_run())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.replace(b"# license: choose one;", b"license: apache-2.0  #"),
        lambda card: card + b"\nA word of mine.\n",
        lambda card: card.removesuffix(b"\n"),
        lambda card: card.replace(b"\n", b"\r\n"),
        lambda card: b"all my own",
        lambda card: b"",
    ],
)
def test_a_card_that_someone_changed_is_kept_until_it_is_removed(
    change: Callable[[bytes], bytes], fake_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_run()
    kept = reached(change, run)
    _, card = write_report(run)
    assert kept == card.read_bytes() and b"1.235" not in kept
    line = f"report: {card} was changed by hand and is kept; remove it to have it written anew\n"
    assert capsys.readouterr().out == 2 * line
    card.unlink()
    assert b"1.235" in write_report(run)[1].read_bytes()
    assert capsys.readouterr().out == ""


def test_neither_card_nor_page_has_a_path_of_this_machine(fake_run: Callable[..., Path]) -> None:
    paths = {
        "corpus": {"path": "/home/somebody/texts/speeches.jsonl", "name": None, "held_out": 0.1},
        "teacher": {
            "model": "~/models/large",
            "tokenizer": "C:\\Users\\somebody\\words.model",
            "class_path": "huggingface",
        },
        "student": {
            "class_path": "/home/somebody/own.py:Own",
            "options": {"model": "/home/somebody/hub/small", "more": [{"from": "/home/somebody/list"}, 3]},
        },
        "cache": {"dir": "file:///home/somebody/caches/one"},
        "evaluate": {"tasks_path": "/home/somebody/tasks", "tasks": ["arc_easy"]},
        "run_dir": "/home/somebody/runs/first",
    }
    page, card = write_report(fake_run(change=lambda content: content.update(experiment=paths)))
    shown = card.read_text(encoding="utf-8")
    assert "somebody" not in shown and "~/" not in shown
    assert "Distilled from large into a student of class own.py:Own" in shown
    listed = yaml.safe_load(re.search(r"```yaml\n(.*?)```", shown, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert listed == {
        "corpus": {"path": "speeches.jsonl", "name": None, "held_out": 0.1},
        "teacher": {"model": "large", "tokenizer": "words.model", "class_path": "huggingface"},
        "student": {"class_path": "own.py:Own", "options": {"model": "small", "more": [{"from": "list"}, 3]}},
        "cache": {"dir": "one"},
        "evaluate": {"tasks_path": "tasks", "tasks": ["arc_easy"]},
        "run_dir": "first",
    }
    whole = page.read_text(encoding="utf-8")
    assert "somebody" not in whole and "Distilled from large" in whole


def test_front_matter_is_the_hubs(fake_run: Callable[..., Path], tmp_path: Path) -> None:
    _, card = write_report(fake_run())
    _, matter, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(matter) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    assert "# license: " in matter
    custom = fake_run("custom")
    (custom / "student").mkdir()
    assert "library_name" not in write_report(custom)[1].read_text(encoding="utf-8").split("---\n")[1]


@pytest.mark.parametrize(
    "model", ["smollm2-135m-demo", "/models/llama", "./a/b", "a/b/c", "models/teacher.gguf", 3, None]
)
def test_a_teacher_that_is_not_on_the_hub_is_not_named(model: Any) -> None:
    assert hub_name({"teacher": {"model": model}}) == ""


def test_a_local_folder_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name({"teacher": {"model": "models/teacher"}}) == "models/teacher"
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name({"teacher": {"model": "models/teacher"}}) == ""


def test_words_in_markdown_are_words() -> None:
    assert text("a|b *c* <i> `d`\n# e") == "a\\|b \\*c\\* &lt;i&gt; \\`d\\` \\# e"
    assert fenced("a\n```\nb").splitlines() == ["````text", "a", "```", "b", "````"]
