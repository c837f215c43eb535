"""A reader of the user's own: its rows are a corpus like any other, its code counts, and its faults are one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.corpus import open_corpus, streams
from distill.corpus.own_reader import load_reader
from distill.corpus.sources import TextSource
from distill.errors import UserError

README = Path(__file__).resolve().parents[2] / "distill" / "corpus" / "README.md"
TALK = '<talks><talk><turn by="user">Who? {0}</turn><turn by="assistant">The fox {0}.</turn></talk></talks>'


def opened(path: Path, code: str, tokenizer: Any, **options: Any) -> Any:
    """The folder's files as a corpus, read by the function `read` of some code that lies outside of it."""
    for name in [name for name in sys.modules if name.startswith("_plugin_mine")]:
        del sys.modules[name]
    (path.parent / "mine.py").write_text(code)
    source = TextSource(str(path), reader=load_reader(f"{path.parent}/mine.py:read"))
    return open_corpus([source], tokenizer, sequence_length=16, **options)


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    folder = tmp_path / "talks"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.xml").write_text(TALK.format(number))
    return folder


def test_the_readmes_reader_reads_files_of_an_unknown_format(talks: Path, tokenizer: Any) -> None:
    source = re.search(r"```python\n(import xml.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert source is not None
    sets = opened(talks, source[1], tokenizer)
    assert sets.is_conversations and sets.train.documents + sets.held_out.documents == 40
    assert opened(talks, f"{source[1]}\n# a remark\n", tokenizer).fingerprint == sets.fingerprint
    other = opened(talks, source[1].replace("turn.text}", "turn.text + '!'}"), tokenizer)
    assert other.fingerprint != sets.fingerprint
    (talks / "00.xml").write_text(TALK.format("another"))
    assert opened(talks, source[1], tokenizer).fingerprint != sets.fingerprint


def test_of_a_stream_the_code_is_a_part_of_the_fingerprint(
    talks: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LARGE", 1)
    code = "def read(path):\n    yield {'text': path.read_text()}\n"
    first = opened(talks, code, tokenizer, most=4)
    assert first.fingerprint == opened(talks, code, tokenizer, most=4).fingerprint
    assert first.fingerprint != opened(talks, code.replace("read_text()", "read_text()[1:]"), tokenizer).fingerprint


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "yield {'text': 1 / 0}",
            r"00\.xml: corpus.reader .*mine.py:read failed: ZeroDivisionError: .*mine.py, line 2",
        ),
        ("return 3", r"corpus.reader .* failed: TypeError: 'int' object is not iterable"),
        ("yield 'text'", "a str, not a mapping of named columns"),
        ("yield {'words': 'text'}", "words"),
    ],
)
def test_its_faults_are_one_line(body: str, words: str, talks: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=words) as error:
        opened(talks, f"def read(path):\n    {body}\n", tokenizer)
    assert len(str(error.value).splitlines()) == 1


def test_without_files_here_it_is_refused(talks: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        opened(talks.parent / "nowhere", "def read(path):\n    yield {}\n", tokenizer)
    with pytest.raises(UserError, match="did you mean 'read'"):
        load_reader(f"{talks.parent}/mine.py:raed")


def test_an_experiment_names_it(world: Any, distill: Any, talks: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def read(path):\n    yield {'text': path.read_text() * 9}\n")
    corpus = {"path": str(talks), "reader": f"{tmp_path}/mine.py:read"}
    file = world.write(tmp_path / "experiment.yaml", corpus=corpus)
    assert "plain text" in distill("preview", file).done().out
    distill("preview", file, "--corpus.reader", "mine.py:nothing").refused("corpus.reader", "mine.py")
    sources = "[{path: a.txt}]"
    distill("preview", file, "--corpus.path", "null", "--corpus.sources", sources).refused(
        "corpus.reader", "each source"
    )
