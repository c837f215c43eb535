"""The command line: help without waiting, unknown commands, flags, exit statuses, signals, and a quiet process."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill import cli
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.system import interrupt

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "lightning", "datasets", "bitsandbytes", "numpy", "jsonargparse", "yaml"}
MINIMAL = "corpus: {path: corpus.jsonl}\nteacher: {model: teacher}\n"


def replace_recipes(monkeypatch: pytest.MonkeyPatch, find: Callable[[str], Any]) -> None:
    """Let the command line find `find(name)` in place of a recipe; everyone else's imports stay as they are."""
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=find))


Call = tuple[str, Experiment, tuple[str, ...]]


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Return the arguments that the recipes were called with, instead of their work."""
    called: list[Call] = []

    class Recipe:
        def __init__(self, name: str) -> None:
            self.name = name

        def main(self, experiment: Experiment, following: tuple[str, ...]) -> int:
            called.append((self.name.removeprefix("distill.recipes."), experiment, following))
            return 0

    replace_recipes(monkeypatch, Recipe)
    return called


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.yaml").write_text(MINIMAL)
    return str(tmp_path / "a.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Half a second is little: torch alone takes several."""
    code = (
        "import sys\nfrom distill.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n"
        f"    assert not ended.code\nprint('LOADED', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("LOADED []\n")


def test_collections_leave_out_what_the_first_import_made_and_nothing_of_a_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen = gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    cli._imported("json")
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    monkeypatch.delitem(sys.modules, "torch")
    try:
        cli._imported("json")
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_help_of_which_a_part_is_read_ends_quietly() -> None:
    """As in `distill plan --help | head -1`."""
    line = [sys.executable, "-u", "-m", "distill", "plan", "--help"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("distill plan FILE")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_help_names_every_command(distill: Any) -> None:
    for arguments in ([], ["--help"]):
        outcome = distill(*arguments)
        assert outcome.status == 0
        assert all(f"distill {command} " in outcome.out for command in cli.COMMANDS)


def test_a_commands_help_lists_every_key_with_its_documentation(distill: Any) -> None:
    outcome = distill("train-student", "--help")
    assert outcome.status == 0
    assert (
        "--train.learning_rate  (float between 0 and 10; default 0.0006)\n      Peak learning rate of AdamW."
        in outcome.out
    )
    assert "--corpus.path  (str | None; default None)" in outcome.out
    assert "--run_dir  (str; default runs/experiment)" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian-student", "a.yaml"], ["trian-student", "unknown command", "did you mean 'train-student'?"]),
        (["fly"], ["unknown command", f"known: {', '.join(sorted(cli.COMMANDS))}"]),
        (["run"], ["run: which experiment file?"]),
        (["run", "--train.seed", "1"], ["run: which experiment file?"]),
        (["inspect", "nowhere"], ["nowhere", "no such folder"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["inspect"], ["inspect: ", "required", "CACHE"]),
        (["inspect", "a", "--verifi"], ["--verifi", "did you mean '--verify'?", "`distill inspect --help`"]),
        (["quantize", "m", "--to", "d", "--quantization", "int4"], ["--quantization", "'int4'", "nf4"]),
        (["chat", "run", "--seed", "x"], ["chat: --seed: invalid int value: 'x'"]),
        (["plan", "a.yaml", "--card"], ["plan: --card: expected one argument"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_a_wrong_command_is_one_line(distill: Any, arguments: list[str], words: list[str]) -> None:
    outcome = distill(*arguments)
    assert outcome.status == 2
    assert outcome.out == "" and outcome.err.startswith("distill: ") and len(outcome.err.splitlines()) == 1
    assert all(word in outcome.err for word in words), outcome.err


def test_run_is_the_three_phases_and_continues_what_is_unfinished(distill: Any, recipes: list[Call], file: str) -> None:
    assert distill("run", file, "--train.seed", "3").status == 0
    assert [(name, following) for name, _, following in recipes] == [
        ("cache_teacher", ("train-student", "evaluate")),
        ("train_student", ("evaluate",)),
        ("evaluate", ()),
    ]
    assert all(experiment.train.resume and experiment.train.seed == 3 for _, experiment, _ in recipes)


@pytest.mark.parametrize(
    "flag", [["--resume"], ["--train.resume"], ["--train.resume", "true"], ["--train.resume=true"]]
)
def test_flags_need_no_value(distill: Any, recipes: list[Call], file: str, flag: list[str]) -> None:
    assert distill("train-student", file, *flag, "--cache.overwrite").status == 0
    assert recipes[0][0] == "train_student"
    assert recipes[0][1].train.resume and recipes[0][1].cache.overwrite


def test_a_negative_number_is_a_value_and_no_flag(distill: Any, file: str) -> None:
    outcome = distill("train-student", file, "--train.seed", "-1")
    assert outcome.status == 2 and "train.seed: -1 is not between 0 and" in outcome.err


class Stopping:
    """A recipe that is interrupted; what it was before."""

    @staticmethod
    def main(experiment: Experiment, following: tuple[str, ...]) -> int:
        raise interrupt.Interrupted("SIGINT")


@pytest.mark.parametrize("command", ["cache-teacher", "train-student", "evaluate", "run"])
def test_an_interruption_says_how_to_go_on(
    distill: Any, monkeypatch: pytest.MonkeyPatch, file: str, command: str
) -> None:
    """The words after `To go on:` are a command line that a shell reads as the one that was given."""
    replace_recipes(monkeypatch, lambda name: Stopping)
    given = [command, file, "--student.options", "{layers: 2}", "--train.seed", "3"]
    outcome = distill(*given)
    assert outcome.status == 130
    again = shlex.split(outcome.err.partition("To go on: ")[2])
    assert again == ["distill", *given, *(["--resume"] if command == "train-student" else [])]


@pytest.mark.parametrize("command", cli.LOOKS)
def test_a_look_that_is_stopped_left_everything_as_it_was(
    distill: Any, monkeypatch: pytest.MonkeyPatch, file: str, command: str
) -> None:
    class StoppedLook:
        main = staticmethod(lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))

    replace_recipes(monkeypatch, lambda name: StoppedLook)
    outcome = distill(command, file)
    assert (outcome.status, outcome.err) == (130, "\nstopped; nothing was changed\n")


def test_a_signal_waits_while_work_is_under_way_and_a_second_of_its_kind_does_not(no_traces: None) -> None:
    """One of the other kind is the same wish, passed on by the process that started this one."""
    interrupt.install()
    with interrupt.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked()
        with pytest.raises(interrupt.Interrupted):
            interrupt.stop_if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        for second in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(interrupt.Interrupted):
                os.kill(os.getpid(), second)


def test_a_signal_that_came_too_late_for_one_step_stops_the_next(
    distill: Any, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """In the last batch of the cache: the cache is finished, but the training must not begin."""
    called = []

    class LateSignal:
        @staticmethod
        def main(experiment: Experiment, following: tuple[str, ...]) -> int:
            called.append(experiment)
            with interrupt.deferred():
                os.kill(os.getpid(), signal.SIGINT)
            return 0

    replace_recipes(monkeypatch, lambda name: LateSignal)
    assert distill("run", file).status == 130
    assert len(called) == 1


def test_without_work_under_way_a_signal_stops_at_once(no_traces: None) -> None:
    interrupt.install()
    with pytest.raises(interrupt.Interrupted, match="SIGINT"):
        os.kill(os.getpid(), signal.SIGINT)
    assert not issubclass(interrupt.Interrupted, Exception)  # nothing that catches errors may swallow it


def test_a_user_error_of_a_recipe_is_one_line_and_status_2(
    distill: Any, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    class Failing:
        @staticmethod
        def main(experiment: Experiment, following: tuple[str, ...]) -> int:
            raise UserError("where: what: do this")

    replace_recipes(monkeypatch, lambda name: Failing)
    outcome = distill("evaluate", file)
    assert (outcome.status, outcome.err) == (2, "distill: where: what: do this\n")
    assert len(outcome.out.splitlines()) == 1, "a line comes before the recipe is imported"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no switch for it before")
def test_a_phase_in_a_process_of_its_own_takes_no_library_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("open('ran', 'w')")
    code = (
        "import sys\nsys.path[:] = [place for place in sys.path if place]\nfrom distill import cli\n"
        "sys.exit(cli._in_a_process_of_its_own(['--version']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, [path.name for path in tmp_path.iterdir()]) == (0, "", ["argparse.py"])
