"""Reading an experiment file: YAML and overrides to checked dataclasses, and every mistake to one short message."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from distill.errors import UserError, did_you_mean
from distill.experiment import configuration as config
from distill.experiment.configuration import Experiment
from distill.system.files import read_bounded
from distill.system.quiet import quiet

_MOST_BYTES = 2**20


def load_experiment(path: str, overrides: list[str]) -> Experiment:
    """The experiment of a YAML file with overrides such as `["--cache.threshold", "0.01"]`.

    Raises UserError for a missing or broken file, an unknown key (with the nearest known one), a wrong type or value.
    """
    import yaml

    file = Path(path)
    try:
        content = yaml.safe_load(read_bounded(file, _MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        near = [str(other) for other in sorted(file.parent.glob("*.y*ml"))] if file.parent.is_dir() else []
        raise UserError(f"{path}: no such experiment file" + (did_you_mean(path, near) if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_where(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an experiment file is a mapping of corpus, teacher, student, …")
    _check_keys(content, Experiment, path, prefix="")
    _check_overrides(overrides)
    experiment = _parse(path, overrides)
    _check_ranges(experiment)
    return experiment


_GONE = {
    "cache.draws": "; it is gone: remove it, and give a lower cache.threshold instead "
    "(0.01 costs as much as a second draw at 0.02, and is better in every epoch)",
    "cache.exponent": "; it is gone: remove it (random draws come from the teacher's own distribution, "
    "which is unbiased; cache.scheme varopt has less noise)",
}
"""Keys of earlier releases, and what to do without them."""


def _where(error: Any) -> str:
    """What a YAML error says, without its name for the text and the excerpt of it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, for writing it down."""
    return dataclasses.asdict(experiment)


def _check_keys(content: dict[Any, Any], kind: type, path: str, prefix: str) -> None:
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in content.items():
        if key not in known:
            hint = _GONE.get(f"{prefix}{key}") or did_you_mean(str(key), known)
            raise UserError(f"{path}: {prefix}{key}: unknown key{hint}")
        section = _section(known[key])
        if section is not None:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key}: must be a mapping, got {value!r}")
            _check_keys(value, section, path, f"{prefix}{key}.")


def _section(entry: dataclasses.Field) -> type | None:
    """The dataclass of a field that is a section of the file, None for a plain value."""
    kind = getattr(config, str(entry.type), None)
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _check_overrides(overrides: list[str]) -> None:
    for argument in overrides:
        if not argument.startswith("--"):
            continue
        kind: type = Experiment
        walked = "--"
        for key in argument[2:].split("=", 1)[0].split("."):
            if not dataclasses.is_dataclass(kind):
                raise UserError(f"{walked}.{key}: unknown option: {walked[2:]} is a value without keys")
            known = {field.name: field for field in dataclasses.fields(kind)}
            if key not in known:
                hint = _GONE.get(f"{walked[2:]}{key}") or _in_a_section(key) or did_you_mean(key, known)
                raise UserError(f"{walked}{key}: unknown option{hint}")
            if str(known[key].type).startswith("dict"):
                break  # a free mapping such as student.options: whom it is for says what it may hold
            kind = _section(known[key]) or str
            walked += f"{key}." if dataclasses.is_dataclass(kind) else key


def _in_a_section(key: str) -> str:
    """`; did you mean '--train.seed'?` for a key that was given without its section."""
    sections = [
        entry.name for entry in dataclasses.fields(Experiment) if (kind := _section(entry)) and key in _names(kind)
    ]
    return f"; did you mean {' or '.join(f'--{section}.{key}' for section in sections)}?" if sections else ""


def _names(kind: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def print_options() -> None:
    """Every key with its documentation, type and default."""
    for section in dataclasses.fields(Experiment):
        kind = _section(section)
        if kind is None:
            continue
        print(f"{section.name}: {(kind.__doc__ or '').strip()}")
        documentation = _field_documentation(kind)
        for entry in dataclasses.fields(kind):
            default = "required" if entry.default is dataclasses.MISSING else f"default {entry.default}"
            if entry.default_factory is not dataclasses.MISSING:
                default = f"default {entry.default_factory()}"
            print(f"  --{section.name}.{entry.name}  ({entry.type}; {default})\n      {documentation[entry.name]}")
        print()
    documentation = _field_documentation(Experiment)
    for entry in dataclasses.fields(Experiment):
        if _section(entry) is None:
            print(f"  --{entry.name}  ({entry.type}; default {entry.default})\n      {documentation[entry.name]}")


def _field_documentation(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    documentation = {}
    for entry, following in itertools.pairwise(body):
        if isinstance(entry, ast.AnnAssign) and isinstance(following, ast.Expr):
            documentation[entry.target.id] = ast.literal_eval(following.value)  # type: ignore[union-attr]
    return documentation


def _parse(path: str, overrides: list[str]) -> Experiment:
    import argparse

    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--experiment_file", action="config")
    parser.add_class_arguments(Experiment, None)
    try:
        namespace = parser.parse_args(["--experiment_file", path, *overrides])
        with quiet():
            values = parser.instantiate_classes(namespace)
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {_plain(str(error))}") from None
    names = [field.name for field in dataclasses.fields(Experiment)]
    return Experiment(**{name: getattr(values, name) for name in names})


def _plain(message: str) -> str:
    """jsonargparse's message in one line, without the names of Python's types."""
    line = " ".join(message.split())
    line = re.sub(r'^Parser key "([^"]+)":', r"\1:", line)
    line = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", line)
    line = re.sub(r"<class '(\w+)'>", r"\1", line)
    return line.replace("Expected a one of", "expected one of").replace("Expected a", "expected")


_RANGES: dict[str, tuple[float, float]] = {
    "corpus.sequence_length": (2, 2**20),
    "corpus.held_out": (0, 0.5),
    "cache.threshold": (1e-4, 1),
    "cache.entries": (1, 65_535),
    "cache.bytes_per_token": (1, 1e6),
    "cache.temperature": (1e-2, 100),
    "cache.seed": (0, 2**63),
    "cache.batch_size": (1, 2**16),
    "cache.devices": (1, 1024),
    "cache.num_nodes": (1, 1024),
    "cache.local_copy_gb": (0.001, 1e6),
    "cache.shard_samples": (1, 2**20),
    "cache.chunk_size": (1, 2**20),
    "cache.max_samples": (1, 2**40),
    "cache.held_out_samples": (0, 2**40),
    "loss.alpha": (0, 1),
    "loss.beta": (0, 1),
    "loss.skew": (0, 1),
    "loss.feature_weight": (0, 10**6),
    "loss.chunk_size": (1, 2**20),
    "train.epochs": (1, 10**6),
    "train.max_steps": (1, 10**9),
    "train.batch_size": (1, 2**16),
    "train.accumulate_grad_batches": (1, 2**16),
    "train.learning_rate": (0, 10),
    "train.warmup_fraction": (0, 1),
    "train.decay_fraction": (0, 1),
    "train.final_learning_rate": (0, 1),
    "train.weight_decay": (0, 10),
    "train.beta1": (0, 1),
    "train.beta2": (0, 1),
    "train.gradient_clip": (0, 10**6),
    "train.seed": (0, 2**31),
    "train.devices": (1, 1024),
    "train.num_workers": (0, 256),
    "train.log_every_steps": (1, 10**9),
    "train.validate_every_steps": (1, 10**9),
    "train.checkpoint_every_steps": (1, 10**9),
    "train.keep_checkpoints": (1, 10**6),
    "train.checkpoint_every_k": (1, 10**6),
    "train.early_stopping": (1, 10**6),
    "train.num_nodes": (1, 1024),
    "evaluate.seeds": (1, 100),
    "evaluate.tasks_limit": (1, 2**40),
    "evaluate.texts": (0, 1000),
    "evaluate.text_tokens": (1, 2**16),
    "evaluate.max_samples": (1, 2**40),
    "evaluate.batch_size": (1, 2**16),
}


def _check_ranges(experiment: Experiment) -> None:
    """All values that are out of their range, in one message."""
    wrong = []
    for key, (low, high) in _RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(experiment, section), name)
        if value is not None and not low <= value <= high:
            wrong.append(f"{key}: {value} is not between {low:g} and {high:g}")
    if wrong:
        raise UserError("; ".join(wrong))
