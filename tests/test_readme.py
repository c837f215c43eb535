"""The README is true: its student trains with its command, its commands exist, its keys and links are there."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import distill as distill_package
from distill import cli, folder_commands, load_student
from distill.experiment import configuration as config
from distill.experiment.file import load_experiment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = sorted(path for path in ROOT.glob("*/**/README.md") if ".venv" not in path.parts and "build" not in path.parts)


def commands() -> list[list[str]]:
    """Every `distill …` line of the READMEs' blocks as the words a shell makes of it, continuation lines joined."""
    texts = [README, *(path.read_text(encoding="utf-8") for path in ROOMS)]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(texts))
    lines = re.findall(r"^(?: {4}|\$ )?(?:\.venv/bin/)?distill (.*)$", joined, flags=re.MULTILINE)
    parts = [part.removeprefix("distill ") for line in lines for part in line.split(" && ") if "[--" not in line]
    return [shlex.split(part, comments=True) for part in parts]


def students_source() -> str:
    """The python block that follows the words `my_student.py`."""
    return re.split(r"```python\n", README.split("`my_student.py`", 1)[1], maxsplit=1)[1].split("```", 1)[0]


def students_command() -> list[str]:
    (found,) = [command for command in commands() if any("my_student.py" in word for word in command)]
    return found


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_a_strangers_student_trains_by_the_readmes_own_words(
    world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_student.py").write_text(students_source(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # a folder outside of the repository, in which there is nothing of ours
    file = world.write(tmp_path / "experiment.yaml")
    distill("cache-teacher", file).done()
    command = students_command()
    replaced = {
        "configs/demo.yaml": file,
        option(command, "--run_dir"): "tiny",
        option(command, "--cache.dir"): "run/cache",
    }
    command = [replaced.get(word, word) for word in command]
    assert command[0] == "train-student" and "my_student.py:Tiny" in command
    assert "the first loss is" not in distill(*command).done().out, "it begins as one that knows nothing"
    more = ["--evaluate.cost", "true", "--evaluate.texts", 1, "--evaluate.text_tokens", 8]
    distill("evaluate", *command[1:], *more).done()
    result = json.loads((tmp_path / "tiny/evaluation.json").read_text())
    assert result["fidelity"]["student"]["kl"] < result["fidelity"]["before"]["kl"]
    assert result["cost"]["student"]["prompt_tokens"] < 48 and result["texts"]["student"], "it reads 48 tokens at most"
    options = json.loads((tmp_path / "tiny/student/student.json").read_text())["options"]
    assert options == {"size": 64, "layers": 2, "vocab_size": 400, "sequence_length": 48}


def test_a_strangers_student_is_short() -> None:
    assert len([line for line in students_source().splitlines() if line.strip()]) <= 36


def test_the_blocks_of_the_python_section_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.split("## From Python\n", 1)[1].split("\n## ", 1)[0]
    first, second = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    world.write(tmp_path / "my.yaml", evaluate={"max_samples": 8})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(first, names)
    kl = json.loads((tmp_path / "runs/mine/evaluation.json").read_text())["fidelity"]["student"]["kl"]
    assert names["results"].frame()["kl"]["student"] == kl
    assert names["results"].frame()["kl.low"]["student"] < kl < names["results"].frame()["kl.high"]["student"]
    assert names["results"].curves()["held_out_kl"].notna().any()
    before = {name: value.clone() for name, value in load_student("runs/mine")[0].state_dict().items()}
    exec(second, names)
    after = names["model"].state_dict()
    assert all(not after[name].equal(value) for name, value in before.items() if value.is_floating_point())
    table = re.findall(r"`(\w+)[(`.]", "".join(line for line in section.splitlines() if line.startswith("| `")))
    assert set(distill_package.__all__) - {*table, "Experiment", "Batch", "ChunkTarget", "UserError"} == set()


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 2
    assert "run" in {command[0] for command in commands()}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_of_a_block_is_one(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert command[0] in cli.COMMANDS
    if command[0] in folder_commands.COMMANDS:
        folder_commands.make_parser(command[0])[0].parse_args(command[1:])
        return
    own = (
        cli.look_parser(command[0]).parse_known_args(command[2:])[1]
        if command[0] in (*cli.LOOKS, "sweep")
        else command[2:]
    )
    file, overrides = command[1], cli._spelled_out(own)
    if file.startswith("my"):  # an experiment file of the reader's own
        file = "configs/demo.yaml"
    assert load_experiment(file, overrides).run_dir


@pytest.mark.parametrize("text", re.findall(r"`distill ([^`]+)`", README))
def test_every_command_in_the_text_is_one(text: str) -> None:
    words = text.split()
    assert words[0] in cli.COMMANDS
    known = {"--help", "--resume"}
    if words[0] in (*cli.LOOKS, "sweep"):
        known |= {name for action in cli.look_parser(words[0])._actions for name in action.option_strings}
    if words[0] in folder_commands.COMMANDS:
        known = {name for action in folder_commands.make_parser(words[0])[0]._actions for name in action.option_strings}
    assert {word.strip("[]") for word in words if "--" in word} <= known


def test_every_key_in_the_text_exists() -> None:
    sections = {
        entry.name: {key.name for key in fields(getattr(config, str(entry.type)))}
        for entry in fields(config.Experiment)
        if is_dataclass(getattr(config, str(entry.type), None))
    }
    mentioned = re.findall(rf"`(?:--)?({'|'.join(sections)})\.(\w+)[ :`]", README)
    assert len(mentioned) >= 8
    assert [(section, key) for section, key in mentioned if key not in sections[section]] == []


def test_every_command_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `distill ([\w-]+) ", README, flags=re.MULTILINE)) == set(cli.COMMANDS)


def places(text: str) -> set[str]:
    """Return the names by which a hub's pages link to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, place in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", text):
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not place or place[1:] in places(file.read_text(encoding="utf-8")), f"{target}{place}"
