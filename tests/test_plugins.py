"""Plug-ins are found by name, their options checked, their result held to the contract; mistakes are one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill import plugins
from distill.errors import UserError

SOURCE = """
from __future__ import annotations
from typing import Literal
import torch
from distill.models.language_model import Head

class Mine(torch.nn.Module):
    def __init__(self, vocab_size: int, width: int, rate: float = 0.1, sizes: list[int] | None = None,
                 kind: Literal["a", "b"] = "a"):
        super().__init__()
        if width > 100:
            raise ValueError("width is too large")
        self.given = (vocab_size, width, rate, sizes, kind)
        self.embedding = torch.nn.Embedding(vocab_size, width)

    def body(self, input_ids_BL, position_ids_BL):
        return self.embedding(input_ids_BL)

    @property
    def head(self):
        return Head(self.embedding.weight)

class NoBody(Mine):
    body = None

class TensorHead(Mine):
    head = torch.zeros(2, 2)

class NoHead(torch.nn.Module):
    def body(self, a, b): ...

def not_a_module():
    return 3

def anything(**options):
    return Mine(5, **options)

value = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def refused(reference: str, match: str, options: dict[str, object] | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        plugins.build(reference, "student", options or {}, {"vocab_size": 7})
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_a_module_and_a_short_name_are_found(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugins.load(f"{file}:Mine", "student").__name__ == "Mine"
    assert plugins.load(f"{file}:Mine", "student") is plugins.load(f"{file}:Mine", "student")
    (tmp_path / "some_unlikely_package").mkdir()
    (tmp_path / "some_unlikely_package" / "inner.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert plugins.load("some_unlikely_package.inner:Mine", "student").__module__ == "some_unlikely_package.inner"
    refused("some_unlikely_package.iner:Mine", "did you mean 'some_unlikely_package.inner'")
    for kind, table in plugins.BUILT_IN.items():
        for name in table:
            assert callable(plugins.load(name, kind))  # type: ignore[arg-type]


def test_options_reach_the_constructor_and_the_offered_fill_the_gaps(file: str) -> None:
    offered = {"vocab_size": 7, "sequence_length": 5}
    options = {"width": 4, "rate": 1, "sizes": [1, 2], "kind": "b"}
    assert plugins.build(f"{file}:Mine", "student", options, offered).given == (7, 4, 1, [1, 2], "b")
    assert plugins.build(f"{file}:Mine", "student", {"width": 4, "vocab_size": 9}, offered).given[0] == 9
    assert plugins.arguments(f"{file}:Mine", "student", {"width": 4}, offered) == {"vocab_size": 7, "width": 4}
    assert plugins.build(f"{file}:anything", "student", {"width": 4}, offered).given[:2] == (5, 4)


def test_numbers_given_as_text_are_read(file: str) -> None:
    made = plugins.build(f"{file}:Mine", "student", {"width": "4", "rate": "1e-3", "sizes": "[3]"}, {"vocab_size": 7})
    assert made.given == (7, 4, 1e-3, [3], "a")


def test_wrong_references_are_one_message_with_the_nearest(file: str, tmp_path: Path) -> None:
    refused("compat", "did you mean 'compact'")
    refused(f"{file}:Mime", "did you mean 'Mine'")
    refused(f"{file}:value", "not a class or function")
    refused(f"{tmp_path}/mime.py:Mine", r"no file '.*mime\.py'; did you mean '.*mine\.py'")
    refused("no_such_package_here.x:Mine", "no module 'no_such_package_here.x'")
    (tmp_path / "broken.py").write_text("import no_such_package_here")
    refused(f"{tmp_path}/broken.py:Mine", "importing .* failed: ModuleNotFoundError")


def test_wrong_options_are_one_message(file: str) -> None:
    refused(f"{file}:Mine", "unknown option 'widht'; did you mean 'width'", {"widht": 4})
    refused(f"{file}:Mine", r"missing width \(known: kind, rate, sizes, vocab_size, width\)")
    refused(f"{file}:Mine", "width: expected int, got 'wide'", {"width": "wide"})
    refused(f"{file}:Mine", "width: expected int, got True", {"width": True})
    refused(f"{file}:Mine", "sizes: expected .*, got 3", {"width": 4, "sizes": 3})
    refused(f"{file}:Mine", "kind: expected .*'a', 'b'.*, got 'c'", {"width": 4, "kind": "c"})
    refused(
        f"{file}:Mine",
        r"student .*mine.py:Mine: its constructor failed: ValueError: width is too large \(mine.py, line 12\)",
        {"width": 101},
    )


def test_the_contract_is_checked(file: str) -> None:
    refused(f"{file}:not_a_module", "made a int, not a torch.nn.Module")
    refused(f"{file}:NoBody", "NoBody has no method 'body", {"width": 4})
    refused(f"{file}:TensorHead", r"'head' is a tensor \[2, 2\] of float32, not", {"width": 4})
    refused(f"{file}:NoHead", "NoHead has no 'head'")


def test_importing_the_loader_imports_no_torch() -> None:
    code = "import sys, distill.plugins; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_seed_is_the_callers() -> None:
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "vocab_size": 7}
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(plugins.build("compact", "student", sizes, {}).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_the_source_of_a_name_for_a_builtin_is_the_file_that_was_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("Student = dict\n")
    first = plugins.source_of(f"{tmp_path}/own.py:Student", "student")
    (tmp_path / "own.py").write_text("Student = dict\nsize = 2\n")
    assert first != plugins.source_of(f"{tmp_path}/own.py:Student", "student")


def test_a_librarys_long_message_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(hidden_size: int) -> None:
        raise ValueError("no such model.\nModel type should be one of\na hundred others")

    monkeypatch.setattr(plugins, "load", lambda *_: make)
    with pytest.raises(UserError, match=r"^student compact: no such model\.$"):
        plugins.build("compact", "student", {"hidden_size": 8}, {})
