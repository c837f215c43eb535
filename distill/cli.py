"""The command line: command, experiment file, overrides. It imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distill import __version__, folder_commands
from distill.errors import UserError, did_you_mean, first_line
from distill.system import interrupt
from distill.system.progress import say, visible
from distill.system.quiet import quiet_command
from distill.system.rank import is_first_process

EXPERIMENT_COMMANDS = {
    "generate": "a model continues prompts: texts to learn from",
    "cache-teacher": "phase 1: the teacher reads the corpus once, its answers go to disk",
    "train-student": "phase 2: the student learns from the cache",
    "evaluate": "the student beside its teacher, on held-out text",
    "run": "cache, training and evaluation, skipping what is done",
    "sweep": "runs that differ in a few settings and share one cache, in one table",
    "preview": "what will be learned, and what is left out; before the teacher is loaded",
    "plan": "will it fit, how long, how much disk; before anything is loaded",
}
COMMANDS = EXPERIMENT_COMMANDS | folder_commands.COMMANDS
LOOKS = ("plan", "preview")
"""Commands with options of their own, which only look."""

_PART_OF_A_RUN = "DISTILL_PART_OF_A_RUN"
"""Name in the environment of a command that `run` started. Then `run` itself says how to resume."""

_run_folder: Path | None = None
"""Run folder of the experiment, once it is read."""

_EPILOG = "\n".join(f"  distill {name:<14} {text}" for name, text in COMMANDS.items())


def main(arguments: list[str] | None = None) -> None:
    """Run a command, and exit with its status.

    0 means done; 1, a check found a difference, or an error that nobody foresaw; 2, the user can mend it; 3, a plan
    does not fit; 130, interrupted; 141, the reader of the output has ended.
    Called without arguments, reads those of the process, and reports every exception in one line.
    """
    try:
        status = _chosen(sys.argv[1:] if arguments is None else arguments)()
    except UserError as error:
        print(f"distill: {visible(str(error))}", file=sys.stderr)
        status = 2
    except (KeyboardInterrupt, interrupt.Interrupted):  # before a command took signals over, or behind its end
        print("\nstopped", file=sys.stderr)
        status = 130
    except Exception as error:
        if arguments is not None:
            raise
        status = _unforeseen(error)
    if arguments is None:
        gc.freeze()  # without it, Python would search a million objects for garbage, which takes two seconds
    sys.exit(status)


def _unforeseen(error: Exception) -> int:
    """Print one line about an exception, and return the exit status: 2 if a disk caused it, 141 if `| head`, else 1."""
    from distill.system import failures

    if isinstance(error, BrokenPipeError) and _output_is_unread():
        return 141
    line = failures.explain(error, _run_folder)
    if line is not None:
        print(f"distill: {visible(line)}", file=sys.stderr)
        return 2
    kept = failures.keep_traceback(error, _run_folder)
    where = f"the full traceback is in {kept}" if kept else "the traceback could not be written anywhere"
    print(
        f"distill: {visible(f'{type(error).__name__}: {first_line(error)[:300]}')} (unforeseen: {where})",
        file=sys.stderr,
    )
    return 1


def _output_is_unread() -> bool:
    """Return whether the reader of our output has ended, as that of `| head` does, and drop what is left for it."""
    import select

    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    is_unread = bool(output.poll(0))  # of no events, poll reports errors alone
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def _imported(module: str) -> Any:
    """Import a module without garbage collection, which would take a fifth of the time: the new objects all stay.

    Behind the first import of this kind, before anything is computed, collections leave out all that is there: else
    later imports of the libraries would take half as long again. Behind others, garbage of a phase may be there.
    """
    is_first = "torch" not in sys.modules
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()
        if is_first:
            gc.freeze()


def _chosen(arguments: list[str]) -> Callable[[], int]:
    """Return a function that does the work that the arguments ask for, and returns the exit status."""
    parser = folder_commands.Options(
        prog="distill",
        usage="distill COMMAND FILE [--section.key value ...]\n       distill COMMAND FOLDER [--option ...]",
        description="Distil a large language model into a small one on one small card.",
        epilog=f"commands:\n{_EPILOG}\n\nEvery key of the experiment file can be given as an option: "
        "--cache.threshold 0.01\n`distill COMMAND --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments or ["--help"])
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(f"{command}: unknown command{did_you_mean(command, COMMANDS)}")
    if command in folder_commands.COMMANDS:
        quiet_command()
        return partial(folder_commands.run, command, rest)
    if any(argument in ("-h", "--help") for argument in rest):
        return partial(_print_options, command)
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{command}: which experiment file? For example: distill {command} configs/demo.yaml")
    if command in LOOKS:
        return partial(_look, command, rest[0], rest[1:])
    if command == "sweep":
        return partial(_sweep, rest[0], rest[1:])
    return partial(_run_recipe, command, rest[0], rest[1:])


def look_parser(command: str) -> argparse.ArgumentParser:
    """Return a parser of the options of `plan`, `preview` or `sweep` that are not keys of the experiment file."""
    parser = folder_commands.Options(prog=f"distill {command}", add_help=False, allow_abbrev=False)
    if command == "plan":
        parser.add_argument(
            "--card", metavar="NAME", help="a card (rtx-3060) or a size (12GiB); default: this machine's device"
        )
        parser.add_argument("--fit", metavar="FILE", help="write the experiment with what makes it fit")
        parser.add_argument("--json", dest="as_json", action="store_true", help="print all as JSON")
    elif command == "sweep":
        parser.add_argument(
            "--vary",
            metavar="KEY=A,B",
            action="append",
            default=[],
            help="a key of student, loss or train and its values; given again, all combinations are run",
        )
    else:
        parser.add_argument(
            "--samples", metavar="N", type=int, default=2, help="print the first N training samples (default: 2)"
        )
        parser.add_argument("--html", metavar="FILE", help="write all of it as a page, with the samples whole")
    return parser


def _look(command: str, path: str, rest: list[str]) -> int:
    """Run one of `LOOKS`."""
    options, overrides = look_parser(command).parse_known_args(rest)
    from distill.experiment.file import load_experiment

    experiment = load_experiment(path, _spelled_out(overrides))
    quiet_command()
    recipe = _recipe_of(command)
    return folder_commands.stoppable(lambda: recipe.main(experiment, **vars(options)), "nothing was changed")


def _print_options(command: str) -> int:
    from distill.experiment.file import print_options

    try:
        print(f"distill {command} FILE [--section.key value ...]: {COMMANDS[command]}\n")
        if command in (*LOOKS, "sweep"):
            for action in look_parser(command)._actions:
                print(f"{f'{action.option_strings[0]} {action.metavar or str()}':<14} {action.help}")
            print()
        print_options()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has ended; Python's own flush at the end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run_recipe(command: str, path: str, overrides: list[str]) -> int:
    from distill.system.output import unbreakable_output

    with unbreakable_output():
        return _run_steps(command, path, _spelled_out(overrides))


def _sweep(path: str, rest: list[str]) -> int:
    """Make the runs of a sweep one after another, each as `distill run` makes it, and their table."""
    options, overrides = look_parser("sweep").parse_known_args(rest)
    from distill.experiment.file import load_experiment
    from distill.system.output import unbreakable_output

    overrides = _spelled_out(overrides)
    folder = load_experiment(path, overrides).run_dir
    quiet_command()
    recipe = _recipe_of("sweep")
    runs = recipe.prepared(path, overrides, options.vary)
    with unbreakable_output():
        for number, run in enumerate(runs, 1):
            say(f"\nsweep: run {number} of {len(runs)}: {run.name}")
            status = _run_steps("run", path, run.overrides, again=shlex.join(["distill", "sweep", path, *rest]))
            if status:
                return status
        recipe.summarise(folder, runs)
    return 0


def _run_steps(command: str, path: str, overrides: list[str], again: str | None = None) -> int:
    """Run a command's steps. `again` is the command that goes on after a stop, if that is another."""
    from distill.experiment.file import load_experiment
    from distill.experiment.stages import Stage, as_overrides, stages
    from distill.system import slurm
    from distill.system.memory import free_memory

    experiment = loaded = load_experiment(path, overrides)
    global _run_folder
    _run_folder = Path(experiment.run_dir)
    quiet_command()
    if is_first_process() and _PART_OF_A_RUN not in os.environ:
        say(f"distill {command}: {path}, results in {experiment.run_dir}")  # what follows takes seconds to import
    if command == "run" or slurm.is_restarted():
        # `run` always resumes a training that was left unfinished, and so does a job that SLURM starts again.
        experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, resume=True))
    # Before signals are taken over: in these seconds they end the program at once.
    _recipe_of("cache-teacher" if command == "run" else command)
    made = stages(experiment) if command == "run" else iter([Stage(command, experiment)])
    try:
        interrupt.install()
        for stage in made:
            interrupt.stop_if_asked()  # a signal may have come in the last batch of the command before
            if stage.title:
                say(f"\n{stage.title}")
            if command == "run" and _has_processes(stage):
                own = as_overrides(stage.experiment, loaded)
                status = _in_a_process_of_its_own([stage.command, path, *overrides, *own])
                if status:
                    return status
            else:
                with interrupt.held_back():
                    recipe = _recipe_of(stage.command)
                recipe.main(stage.experiment, stage.following)
                free_memory()  # the next stage's model is alone
        return 0
    except interrupt.Interrupted:
        if _PART_OF_A_RUN in os.environ:
            return 130
        resume = " --resume" if command == "train-student" and "--train.resume" not in overrides else ""
        again = again or shlex.join(["distill", command, path, *overrides])
        queued = f"{slurm.requeue()}. By hand" if interrupt.requeue_asked() else "To go on"
        print(f"\nstopped; everything so far is kept. {queued}: {again}{resume}", file=sys.stderr)
        return 130


def _has_processes(stage: Any) -> bool:
    """Tell whether a stage of a run is done by several processes, each of which runs its command anew.

    The processes of a cache run the whole command, up to it, so only that of a round is a command of its own.
    """
    of_a_round = bool(stage.title) and stage.command == "cache-teacher"
    trains = stage.command == "train-student"
    return (trains and stage.experiment.train.devices > 1) or (of_a_round and stage.experiment.cache.devices > 1)


def _recipe_of(step: str) -> Any:
    return _imported(f"distill.recipes.{step.replace('-', '_')}")


def _in_a_process_of_its_own(arguments: list[str]) -> int:
    """Run a command whose other devices run it too: each of their processes is started with the command line."""
    import signal
    import subprocess

    # `-m` looks for modules in the current folder first, and that may be a stranger's (Python 3.10 knows no switch).
    found_at = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, _PART_OF_A_RUN: "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": found_at}
    with subprocess.Popen([sys.executable, "-m", "distill", *arguments], env=environment) as process:
        while process.returncode is None:
            try:
                process.wait()
            except interrupt.Interrupted as stop:
                # The terminal may have sent the signal to both processes, and a second one of the same kind would stop
                # at once. So the other kind is passed on.
                process.send_signal(signal.SIGTERM if str(stop) == "SIGINT" else signal.SIGINT)
    if process.returncode == 130:
        raise interrupt.Interrupted("interrupted")
    return process.returncode


def _spelled_out(overrides: list[str]) -> list[str]:
    """Give flags without a value one: `--resume` is `--train.resume true`, `--cache.overwrite` is `... true`."""
    result: list[str] = []
    for position, argument in enumerate(overrides):
        argument = "--train.resume" if argument == "--resume" else argument
        result.append(argument)
        following = overrides[position + 1] if position + 1 < len(overrides) else "--"
        if argument.startswith("--") and "=" not in argument and following.startswith("--"):
            result.append("true")
    return result


if __name__ == "__main__":
    main()
