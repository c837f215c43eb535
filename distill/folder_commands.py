"""The commands that take no experiment file, and their options. It imports nothing heavy."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

from distill.errors import UserError, nearest
from distill.system.output import unbreakable_output

COMMANDS = {
    "init": "an experiment file for your card and data, which fits",
    "inspect": "what is in a cache",
    "merge": "parts of a cache, made on several machines, joined into one",
    "push": "a cache or a student to a bucket or a hub, with its card",
    "pull": "a cache or a student that was pushed, into a new folder",
    "compare": "several runs on one page",
    "export": "the student in a format that other tools read",
    "quantize": "a checkpoint quantised once, for teachers that are larger than the memory",
    "chat": "talk with the student in the terminal",
    "doctor": "what this machine is, what it can do, what is wrong with it",
}


def run(command: str, arguments: list[str]) -> int:
    """Run one of `COMMANDS`, and return its exit status."""
    parser, recipe = make_parser(command)
    return recipe(parser.parse_args(arguments), arguments)


def make_parser(command: str) -> tuple[argparse.ArgumentParser, Recipe]:
    """Return the parser of a command's options, and the function that takes them."""
    parser = Options(prog=f"distill {command}", description=COMMANDS[command])
    return parser, _OPTIONS[command](parser)


class Options(argparse.ArgumentParser):
    """Parser of a command's options whose mistakes are a UserError, of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError with argparse's words."""
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].partition("=")[0]
        near = nearest(unknown, known) if unknown else ""
        command = self.prog.removeprefix("distill").lstrip()
        words = message.removeprefix("argument ")
        raise UserError(f"{command}{': ' * bool(command)}{words}{near} (`{self.prog} --help` lists the options)")


Recipe = Callable[[argparse.Namespace, list[str]], int]
"""Function of the options, and of the arguments that they were read from."""


def stoppable(work: Callable[[], int], words: str) -> int:
    """Do the work. On Ctrl-C and SIGTERM print `words`, which say what is left of it."""
    from distill.system import interrupt

    interrupt.install()
    try:
        return work()
    except interrupt.Interrupted:
        print(f"\nstopped; {words}", file=sys.stderr)
        return 130


def _init(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("--data", metavar="PATH", help="a file, a folder, or a hub data set's name")
    parser.add_argument("--goal", metavar="GOAL", help="chat, text or draft (default: as the data are)")
    parser.add_argument("--card", metavar="NAME", help="a card (rtx-3060) or a size (12GiB); default: this machine")
    parser.add_argument("--hours", metavar="N", help="time for all of it, such as 8 or 90m (default: no limit)")
    parser.add_argument("--teacher", metavar="MODEL", help="default: the largest that ships and suits the card")
    parser.add_argument("--student", metavar="STUDENT", help="pruned (the default), a size such as 60M, or a model")
    parser.add_argument("--to", metavar="FILE", default="my.yaml", help="the new file (default: my.yaml)")
    parser.add_argument("--yes", action="store_true", help="ask nothing")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import init

        return stoppable(lambda: init.main(init.Wishes(**vars(options))), f"{options.to} was not written")

    return recipe


def _inspect(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("cache", metavar="CACHE", help="folder or URL of the cache, or a run folder")
    parser.add_argument("--verify", action="store_true", help="read everything, compare every hash (status 1: differs)")
    parser.add_argument("--repair", action="store_true", help="drop what is damaged; cache-teacher then makes it anew")
    parser.add_argument("--sample", type=int, metavar="N", help="print training sample N, token by token")
    parser.add_argument("--teacher", metavar="MODEL", help="compare some targets with this teacher's distributions")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import inspect

        return stoppable(
            lambda: inspect.main(options.cache, options.verify, options.repair, options.sample, options.teacher),
            "damage that was dropped so far stays dropped" if options.repair else "nothing was changed",
        )

    return recipe


def _merge(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument(
        "parts",
        metavar="PART",
        nargs="+",
        help="folder or URL of a part (--cache.part 3/8 makes them), or its run folder",
    )
    parser.add_argument("--to", metavar="CACHE", required=True, help="folder of the whole cache: new, or begun before")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import merge

        again = shlex.join(["distill", "merge", *arguments])
        words = f"everything so far is kept. To go on: {again}"
        with unbreakable_output():
            return stoppable(lambda: merge.main(options.parts, options.to), words)

    return recipe


def _push(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument(
        "folder", metavar="FOLDER", help="a cache, a run_dir (its student is meant), a model's folder, or an export's"
    )
    parser.add_argument(
        "--to", metavar="URL", required=True, help="s3://bucket/name or another fsspec URL, or hf://OWNER/NAME"
    )
    parser.add_argument("--public", action="store_true", help="of the hub: a new repository is seen by all")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import push

        words = f"files that are there stay. To go on: {shlex.join(['distill', 'push', *arguments])}"
        with unbreakable_output():
            return stoppable(lambda: push.main(options.folder, options.to, options.public), words)

    return recipe


def _pull(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("url", metavar="URL", help="the URL that `distill push` was given")
    parser.add_argument("--to", metavar="DIR", required=True, help="a new folder")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import pull

        words = f"files that are here stay. To go on: {shlex.join(['distill', 'pull', *arguments])}"
        with unbreakable_output():
            return stoppable(lambda: pull.main(options.url, options.to), words)

    return recipe


def _compare(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run_dir of a finished evaluation")
    parser.add_argument("--to", metavar="FILE", default="compare.html", help="the page (default: compare.html)")
    parser.add_argument("--csv", metavar="FILE", help="a row for each run: how it differs, and its figures; a new file")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON, with means over seeds; a new file")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import compare

        with unbreakable_output():
            return stoppable(
                lambda: compare.main(options.runs, options.to, options.csv, options.json),
                f"{options.to} was not written",
            )

    return recipe


def _class_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class_path", metavar="CLASS", help="the student's class, where it is your own: my_file.py:MyStudent"
    )


def _export(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("run", metavar="RUN", help="run_dir of a finished training, or a model's folder")
    parser.add_argument("--to", metavar="DIR", required=True, help="a new folder")
    parser.add_argument("--format", default="hf", help="hf (a Hugging Face folder, the default), gguf or onnx")
    parser.add_argument("--type", help="hf: float32, bfloat16, float16; gguf: f16, q8_0, q4_0, …")
    parser.add_argument("--with_code", action="store_true", help="hf, of a class of your own: its source goes along")
    _class_path(parser)

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import export

        with unbreakable_output():
            return stoppable(
                lambda: export.main(
                    options.run, options.to, options.format, options.type, options.with_code, options.class_path
                ),
                f"{options.to} was not made",
            )

    return recipe


def _quantize(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("model", metavar="MODEL", help="a hub name or a local folder, as teacher.model")
    parser.add_argument("--to", metavar="DIR", required=True, help="a new folder, or one that was begun")
    parser.add_argument("--quantization", choices=["nf4", "int8", "none"], default="nf4", help="default: nf4")
    parser.add_argument(
        "--compute_dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="type of what is not quantised, and of the products (default: bfloat16)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    parser.add_argument(
        "--allow_unquantized", action="store_true", help="even if more than a tenth of its matrices stays unquantised"
    )

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import quantize

        again = shlex.join(["distill", "quantize", *arguments])
        with unbreakable_output():
            return stoppable(
                lambda: quantize.main(
                    options.model,
                    options.to,
                    options.quantization,
                    options.compute_dtype,
                    options.revision,
                    options.trust_remote_code,
                    options.allow_unquantized,
                ),
                f"every finished layer is kept. To go on: {again}",
            )

    return recipe


def _chat(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("run", metavar="RUN", help="run_dir of a finished training, or a model's folder")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    parser.add_argument("--top_p", type=float, default=0.95, help="share of the probability drawn from (default: 0.95)")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same answers again")
    parser.add_argument("--system", metavar="TEXT", help="system message, where the model has a chat template")
    _class_path(parser)

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes import chat

        return stoppable(
            lambda: chat.main(
                options.run,
                options.temperature,
                options.top_p,
                options.max_new_tokens,
                options.seed,
                options.system,
                options.class_path,
            ),
            "nothing was changed",
        )

    return recipe


def _doctor(parser: argparse.ArgumentParser) -> Recipe:
    parser.add_argument("--calibrate", action="store_true", help="measure this machine, so that `plan` knows its pace")
    parser.add_argument("--json", action="store_true", help="print all as JSON")

    def recipe(options: argparse.Namespace, arguments: list[str]) -> int:
        from distill.recipes.doctor import command as doctor

        return stoppable(lambda: doctor.main(options.calibrate, options.json), "nothing was changed")

    return recipe


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], Recipe]] = {
    "init": _init,
    "inspect": _inspect,
    "merge": _merge,
    "push": _push,
    "pull": _pull,
    "compare": _compare,
    "export": _export,
    "quantize": _quantize,
    "chat": _chat,
    "doctor": _doctor,
}
