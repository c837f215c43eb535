"""Failures that no room foresaw, in a process of its own: one line, and what a user can do."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from distill.system import failures

BROKEN = """
import sys
from types import SimpleNamespace
from distill import cli
def fail(*_):
    {0}
cli.importlib = SimpleNamespace(import_module=lambda name: SimpleNamespace(main=fail))
sys.argv = ["distill", "evaluate", "a.yaml"]
cli.main()
"""


def run_failing(folder: Path, line: str) -> Any:
    """Run `evaluate` with a recipe that consists of this line."""
    (folder / "a.yaml").write_text("corpus: {path: c.jsonl}\nteacher: {model: t}\nrun_dir: run\n")
    (folder / "run").mkdir(exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", BROKEN.format(line)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("line", ["raise RuntimeError('odd\\nmore')", "{}['missing']", "assert 1 > 2", "1 / 0"])
def test_an_exception_is_one_line_and_its_traceback_lies_in_the_run_folder(tmp_path: Path, line: str) -> None:
    done = run_failing(tmp_path, line)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    kept = re.search(
        r"^distill: \w+: .*\(unforeseen: the full traceback is in (run/traceback-\S+\.txt)\)$", done.stderr
    )
    assert kept, done.stderr
    text = (tmp_path / kept[1]).read_text()
    assert text.startswith("Traceback") and "cli.py" in text


def test_a_run_folder_that_is_gone_sends_the_traceback_to_the_temporary_files(tmp_path: Path) -> None:
    done = run_failing(tmp_path, "import shutil; shutil.rmtree('run'); 1 / 0")
    assert done.returncode == 1 and len(list(tmp_path.glob("traceback-*.txt"))) == 1, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "raise OSError(28, 'No space left on device', 'run/big')",
        "raise OSError(28, 'No space left on device')",
        "raise RuntimeError('I/O error: No space left on device (os error 28)')",  # as safetensors says it
        "raise PermissionError(13, 'Permission denied', 'run/big')",
    ],
)
def test_a_disk_that_refuses_is_the_users_to_mend(tmp_path: Path, line: str) -> None:
    done = run_failing(tmp_path, line)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "then run the same command again" in done.stderr and not list(tmp_path.rglob("traceback-*"))


@pytest.mark.parametrize("line", ["raise MemoryError", "import torch; raise torch.OutOfMemoryError('CUDA ...')"])
def test_a_lack_of_memory_says_what_helps(tmp_path: Path, line: str) -> None:
    done = run_failing(tmp_path, line)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "out of memory: free the device" in done.stderr and not list(tmp_path.rglob("traceback-*"))


@pytest.mark.parametrize(
    ("place", "variable", "settings"),
    [
        ("home/.cache/huggingface/datasets/x", "HF_HOME", {}),
        ("home/.cache/distill/x", "XDG_CACHE_HOME", {}),
        ("hub", "HF_HOME", {"HF_HOME": "hub"}),
        ("tables/a/b", "HF_DATASETS_CACHE", {"HF_DATASETS_CACHE": "tables"}),
        ("temporary/x", "TMPDIR", {"TMPDIR": "temporary"}),
    ],
)
def test_the_folder_of_a_library_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, variable: str, settings: dict[str, str]
) -> None:
    """The reason may be any: the folder above is a file, say."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", "TMPDIR": "elsewhere", **settings}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    path = tmp_path / place
    error = RuntimeError("a library's own words")
    error.__cause__ = FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
    said = failures.explain(error, tmp_path / "run")
    assert said is not None and said.startswith(f"{path}: ") and f"let {variable} name a folder elsewhere" in said
    assert failures.explain(FileNotFoundError(errno.ENOENT, "No such file", "other/file"), tmp_path / "run") is None


def test_a_cache_folder_that_cannot_be_made_ends_a_real_command_in_one_line(world: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "a.yaml")
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "file/datasets")}
    command = [sys.executable, "-m", "distill", "cache-teacher", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "HF_DATASETS_CACHE" in done.stderr.splitlines()[-1]


def test_a_ctrl_c_before_a_command_took_it_over_is_quiet(tmp_path: Path) -> None:
    done = run_failing(tmp_path, "raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_a_reader_that_has_ended_is_told_apart_from_another_broken_pipe(tmp_path: Path) -> None:
    """The first is `| head`, and quiet; the second is an error."""
    printing = BROKEN.format("while True: print('x' * 9999)").replace('"evaluate", "a.yaml"', '"inspect", "."')
    printing = printing.replace("cli.importlib =", "cli.folder_commands.run = lambda *_: fail()\n_ =")
    command = [sys.executable, "-c", printing]
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
    other = run_failing(tmp_path, "raise BrokenPipeError(32, 'Broken pipe')")
    assert other.returncode == 1 and "unforeseen" in other.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "{long}.yaml"],
        ["cache-teacher", "a.yaml", "--corpus.path", "{long}"],
        ["cache-teacher", "a.yaml", "--teacher.model", "./{long}"],
        ["plan", "a.yaml", "--run_dir", "{long}"],
        ["chat", "{long}"],
        ["export", "{long}", "--to", "new"],
        ["inspect", "{long}"],
        ["merge", "{long}", "--to", "new"],
        ["compare", "{long}"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("no_traces")
def test_a_name_that_is_too_long_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("corpus: {path: c.jsonl}\nteacher: {model: ./t}\npreflight: false\n")
    monkeypatch.setattr(cli.gc, "freeze", lambda: None)  # meant for a program's end
    monkeypatch.setattr(sys, "argv", ["distill", *(argument.format(long="x" * 300) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("distill: ") and said.count("\n") == 1, said
