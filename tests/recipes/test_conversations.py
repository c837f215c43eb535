"""A cache of conversations holds the text that it was begun with, on any day; the student's template is everybody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.corpus.templates import Learning

TEMPLATE = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def experiment(world: Any, tmp_path: Path) -> str:
    rows = [{"question": f"Question {i}?", "answer": "Yes, " * (i + 1)} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dated.jinja").write_text(TEMPLATE)
    corpus = {"path": str(tmp_path / "chats.jsonl"), "chat_template": str(tmp_path / "dated.jinja"), "held_out": 0.3}
    return str(world.write(tmp_path / "experiment.yaml", corpus=corpus, train={"max_steps": 1}))


def test_the_day_is_fixed_when_the_cache_is_begun(distill: Any, tmp_path: Path, experiment: str) -> None:
    begun = distill("cache-teacher", experiment, "--corpus.date", "2024-07-26").done().out
    assert "pairs of prompt and completion, 20 rows" in begun and "today is 2024-07-26" in begun
    assert "end-of-turn" not in begun
    fingerprints = json.loads((tmp_path / "run/cache/manifest.json").read_text())["fingerprints"]
    assert fingerprints["date"] == "2024-07-26" and "conversations" not in fingerprints
    assert "nothing to do" in distill("cache-teacher", experiment).done().out
    distill("cache-teacher", experiment, "--corpus.date", "2024-07-27").refused("date", "2024-07-26", "2024-07-27")
    distill("cache-teacher", experiment, "--corpus.learn", "last").refused("learn last, thoughts keep")
    distill("cache-teacher", experiment, "--corpus.date", "soon").refused("corpus.date: 'soon' is no day")
    distill("cache-teacher", experiment, "--corpus.chat_template", "no.jinja").refused(
        "corpus.chat_template", "no such"
    )
    distill("train-student", experiment, "--corpus.date", "2024-07-27").refused("2024-07-26", "2024-07-27")
    distill("train-student", experiment).done()
    (student,) = tmp_path.glob("run/student/chat_template.jinja")
    assert "generation %}" not in student.read_text().replace("add_generation_prompt %}", "")
    assert student.read_text().startswith("Today is")


def test_a_cache_of_other_turns_is_not_trained_from(distill: Any, tmp_path: Path, experiment: str) -> None:
    unended = TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    (tmp_path / "dated.jinja").write_text(unended)
    out = distill("cache-teacher", experiment, "--corpus.learn", "last", "--corpus.thoughts", "drop").done().out
    assert "the last answers of 20 conversations are learned without an end-of-turn token" in out
    distill("train-student", experiment).refused("learn assistant, thoughts keep", "learn last, thoughts drop")


def test_other_tokens_of_an_earlier_day_are_not_continued(
    distill: Any, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of an earlier release does not say its day."""
    with monkeypatch.context() as earlier:
        earlier.setattr(Learning, "described", lambda *_: {})
        distill("cache-teacher", experiment, "--corpus.date", "2024-07-26").done()
    distill("cache-teacher", experiment, "--corpus.date", "2024-07-27").refused("other tokens", "--corpus.date")
    assert "nothing to do" in distill("cache-teacher", experiment, "--corpus.date", "2024-07-26").done().out


def test_conversations_are_whole_and_a_cache_of_cut_ones_goes_on_as_it_is(
    distill: Any, tmp_path: Path, experiment: str
) -> None:
    """A cache of an earlier release has no words for its packing; `auto` then means what its manifest says."""
    cut = ["--corpus.date", "2024-07-26", "--cache.dir", tmp_path / "cut"]
    whole = ["--corpus.date", "2024-07-26", "--cache.dir", tmp_path / "whole"]
    distill("cache-teacher", experiment, *cut, "--corpus.pack", "true").done()
    said = distill("cache-teacher", experiment, *whole).done().out
    assert "packed as documents, long split" in said and "documents split" in said
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("cut", "whole")]
    assert [found["fingerprints"].get("samples") for found in manifests] == [None, "documents, long split"]
    assert [found["pack"] for found in manifests] == [True, True]
    (tmp_path / "cut/shards/train-000000.safetensors").unlink()
    assert "continuing" in distill("cache-teacher", experiment, *cut).done().out
    distill("train-student", experiment, *cut).done()
    distill("cache-teacher", experiment, *cut, "--corpus.pack", "documents").refused("documents, long split")
    distill("train-student", experiment, *whole, "--corpus.long", "skip").refused("long skip", "long split")
    distill("cache-teacher", experiment, "--corpus.pack", "stream", "--corpus.long", "skip").refused("corpus.long")


def test_parts_of_two_days_are_not_merged(distill: Any, tmp_path: Path, experiment: str) -> None:
    parts = [tmp_path / name for name in ("first", "second")]
    for number, part in enumerate(parts, start=1):
        made = ["--cache.dir", part, "--cache.part", f"{number}/2", "--corpus.date", f"2024-07-2{number}"]
        distill("cache-teacher", experiment, *made).done()
    distill("merge", *parts, "--to", tmp_path / "whole").refused("date", "2024-07-21", "2024-07-22")
    assert not (tmp_path / "whole").exists()
