"""`distill preview` shows what will be learned, token by token, and loads no model; its page is safe and complete."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from distill import UserError, load_experiment, preview
from distill.experiment.teacher import Teacher
from distill.models import checkpoints
from distill.recipes.preview.tokens import escaped

ANSWERS = ["Néant.\tOui\x1b[31m", "<script>alert(1)</script>", "日本 😀", "the same", "the same"]
QUESTIONS = ["One?", "Two?\nOr three?", "Three?", "Four?", "Four?"]


@pytest.fixture
def file(world: Any, tmp_path: Path) -> str:
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    rows = [{"prompt": question, "completion": answer} for question, answer in pairs]
    rows += [{"prompt": "No answer", "completion": ""}, {"prompt": 3, "completion": "x"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = {"path": str(tmp_path / "chats.jsonl"), "held_out": 0, "sequence_length": 256, "bad_rows": "skip"}
    return str(world.write(tmp_path / "experiment.yaml", corpus=corpus))


def marked(out: str) -> str:
    """The texts above the marks, put together."""
    lines = out.splitlines()
    found = ""
    for text, marks in itertools.pairwise(lines):
        if re.fullmatch(r"[ ~]*~[ ~]*", marks):
            cells = [letter for letter in text for _ in range(2 if ord(letter) > 0x2E80 else 1)]
            learned = [cell for cell, mark in zip(cells, marks, strict=False) if mark == "~"]
            found += "".join(letter for place, letter in enumerate(learned) if ord(letter) <= 0x2E80 or place % 2)
    return found


def test_learned_tokens_are_marked_and_everything_is_counted(
    distill: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("loaded the teacher"))
    out = distill("preview", file, "--samples", 1).done().out
    assert "chats.jsonl: 4 documents (0 held out)" in out and "pairs of prompt and completion, 6 rows" in out
    assert "left out of 7 rows: 1 column '…' is int, not text, 1 empty, 1 exact duplicate" in out
    found = preview(load_experiment(file), samples=1)
    assert found.counts[0].documents == 4 and all(line in out for line in found.facts)
    learned = sum(piece.tokens for each in found.samples[0] for piece in each.pieces if piece.is_learned)
    assert f"training sample 0 of {found.total}: {learned} of 256 tokens are learned" in out
    with pytest.raises(UserError, match="-1 is negative"):
        preview(load_experiment(file), -1)
    assert out.count("-- from token ") == 5 and "padding, " in out, "each document's beginning, and the padding's"
    assert "\x1b" not in out and "\\x1b[31m" in out.replace("|", ""), "what steers a terminal is shown, not sent"
    shown = marked(out)
    assert sorted(shown.split("<|im_end|>")[:-1]) == sorted({escaped(answer) for answer in ANSWERS})
    assert "Or three?" not in shown and "|\\n|" in out
    assert not (tmp_path / "run").exists()


def test_the_page_holds_whole_samples_and_no_markup_of_theirs(distill: Any, file: str, tmp_path: Path) -> None:
    page = tmp_path / "preview.html"
    distill("preview", file, "--html", page).done()
    content = page.read_text(encoding="utf-8")
    assert "<script" not in content and "\x1b" not in content
    learned = html.unescape("".join(re.findall(r'<span class="learned">(.*?)</span>', content)))
    assert sorted(learned.split("<|im_end|>")[:-1]) == sorted({escaped(answer) for answer in ANSWERS})
    assert "exact duplicate" in content and "Lengths in chats.jsonl" in content
    distill("preview", file, "--html", page).done()  # its own page is written anew
    page.write_text("mine")
    distill("preview", file, "--html", page).refused("is no page of distill preview", "--html")
    distill("preview", file, "--samples", -1).refused("--samples -1")


def test_answers_without_an_end_are_told(distill: Any, file: str, tmp_path: Path) -> None:
    (tmp_path / "no_end.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    template = ["--corpus.chat_template", tmp_path / "no_end.jinja"]
    told = "he last answers of 4 conversations are learned without an end-of-turn token"
    assert told in distill("preview", file, *template).done().out
    assert "end-of-turn" not in distill("preview", file).done().out


def test_a_long_sample_says_that_it_goes_on(world: Any, distill: Any, tmp_path: Path) -> None:
    text = {"text": " ".join(f"{number} speeches" for number in range(300))}
    (tmp_path / "long.jsonl").write_text(json.dumps(text))
    corpus = {"path": str(tmp_path / "long.jsonl"), "held_out": 0, "sequence_length": 256}
    file = world.write(tmp_path / "experiment.yaml", corpus=corpus)
    out = distill("preview", file).done().out
    assert out.count("goes on from the sample before") == 1 and "1 documents are longer than a sample" in out


def test_of_a_teacher_on_the_hub_no_weights_are_fetched(
    distill: Any, file: str, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *_: Any, files: list[str]) -> checkpoints.Checkpoint:
        asked.append(files)
        return checkpoints.Checkpoint(world.folder / "teacher", None, name)

    monkeypatch.setattr(checkpoints, "download", download)
    distill("preview", file, "--teacher.model", "owner/some-teacher", "--samples", 0).done()
    assert asked and not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    assert "*.json" in asked[0]
