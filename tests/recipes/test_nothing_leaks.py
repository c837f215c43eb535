"""Files that the commands leave behind tell nothing of the machine and its user, and no command asks the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOMEBODY = "zoe-quirk"
"""A user's name, in every path of the experiment."""
COMMANDS = """
import io, json, sys
asked = []

def deny(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event == "socket.connect" and isinstance(arguments[1], tuple)
    ):
        asked.append(f"{event} {arguments[-1]}")
        raise PermissionError(event)

sys.addaudithook(deny)
from distill.cli import main
ended = []
for arguments in json.loads(sys.argv[1]):
    sys.stdin = io.StringIO("Hello\\n")
    try:
        main(arguments)
    except SystemExit as end:
        ended.append(end.code)
print(json.dumps({"ended": ended, "asked": asked}))
"""


@dataclass(frozen=True)
class Made:
    """Files in a user's home after the commands, and how these ended."""

    home: Path
    out: str
    ended: list[int]
    asked: list[str]


def without_network() -> list[str]:
    """Return what begins a command line that runs in a network namespace without interfaces, where that is allowed."""
    unshare = [shutil.which("unshare") or "false", "--map-root-user", "--net"]
    return unshare if subprocess.run([*unshare, "true"], capture_output=True).returncode == 0 else []


@pytest.fixture(scope="module")
def made(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    home = tmp_path_factory.mktemp("home") / SOMEBODY
    shutil.copytree(Path(world.folder) / "teacher", home / "teacher")
    shutil.copy(Path(world.folder) / "corpus.jsonl", home / "corpus.jsonl")
    (home / "own.py").write_text((ROOT / "students/compact.py").read_text().replace("CompactDecoder", "Own"))
    content = {
        "corpus": {"path": str(home / "corpus.jsonl")},
        "teacher": {"model": str(home / "teacher")},
        "evaluate": {"texts": 1, "max_samples": 2},
        "train": {"max_steps": 2, "validate_every_steps": 2, "log_every_steps": 1, "loggers": ["csv", "tensorboard"]},
    }
    file = world.write(home / "experiment.yaml", preflight=True, **content)
    own, named = f"{home}/own.py:Own", ["--class_path", f"{home}/own.py:Own"]
    options = ["--run_dir", f"{home}/own", "--cache.dir", f"{home}/run/cache", "--student.class_path", own]
    options += ["--student.options", "{hidden_size: 16, layers: 1, heads: 2}"]
    commands = [
        ["plan", file],
        ["run", file],
        ["inspect", f"{home}/run/cache", "--verify"],
        ["inspect", f"{home}/run/cache", "--sample", "0"],
        ["chat", f"{home}/run", "--max_new_tokens", "2"],
        ["export", f"{home}/run", "--to", f"{home}/hf"],
        ["export", f"{home}/run", "--to", f"{home}/gguf", "--format", "gguf"],
        ["train-student", file, *options],
        ["evaluate", file, *options],
        ["export", f"{home}/own", "--to", f"{home}/own-hf", "--with_code", *named],
        ["export", f"{home}/own", "--to", f"{home}/own-onnx", "--format", "onnx", *named],
        ["compare", f"{home}/run", f"{home}/own", "--to", f"{home}/compare.html"],
        ["merge", f"{home}/run/cache", "--to", f"{home}/merged"],
        ["doctor"],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ORT_"))}
    environment |= {"HOME": str(home), "USER": SOMEBODY, "LOGNAME": SOMEBODY, "PYTHONPATH": str(ROOT)}
    line = [*without_network(), sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    yield Made(home, done.stdout + done.stderr, said["ended"], said["asked"])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_command_works_without_a_network_and_asks_for_none(made: Made) -> None:
    assert (made.ended, made.asked) == ([0] * 14, []), made.out[-3000:]


@pytest.mark.parametrize("name", ["run", "own", "hf", "gguf", "own-hf", "own-onnx", "merged", "compare.html"])
def test_nothing_that_is_left_behind_names_the_machine_or_its_user(name: str, made: Made) -> None:
    there = made.home / name
    found = {
        str(path.relative_to(made.home)): [
            word for word in (SOMEBODY, str(ROOT), sys.prefix) if word.encode() in content
        ]
        for path in (files(there) if there.is_dir() else [there])
        for content in [path.read_bytes()]
    }
    assert found and {path: words for path, words in found.items() if words} == {}


def test_no_library_keeps_a_name_for_this_machine(made: Made) -> None:
    """onnxruntime would write a number for the device beside its queue of reports."""
    assert not [path for path in files(made.home) if "deviceid" in path.name or "Microsoft" in path.parts]
