"""Experiment files: YAML and overrides become checked dataclasses, and every mistake one short message."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError, did_you_mean
from distill.experiment import configuration, teacher_sections
from distill.experiment.configuration import Experiment
from distill.experiment.plugin_files import with_files_beside
from distill.experiment.stages import with_first_texts
from distill.experiment.values import NO_VALUE, check_values, limits_of
from distill.experiment.yaml_text import load_yaml
from distill.system.files import read_bounded
from distill.system.quiet import quiet

_MOST_BYTES = 2**20


def load_experiment(path: str, overrides: list[str]) -> Experiment:
    """Load the experiment of a YAML file with overrides such as `["--cache.threshold", "0.01"]`.

    Raises UserError for a missing or broken file, an unknown key (with the nearest known one), a wrong type or value.
    """
    return experiment_of(path, read_content(path), overrides)


def read_content(path: str) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises UserError for a missing or broken file."""
    import yaml

    file = Path(path)
    try:
        content = load_yaml(read_bounded(file, _MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        near = [str(other) for other in sorted(file.parent.glob("*.y*ml"))] if file.parent.is_dir() else []
        raise UserError(f"{path}: no such experiment file" + (did_you_mean(path, near) if near else "")) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: it is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_where(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an experiment file is a mapping of corpus, teacher, student, …")
    return content


def experiment_of(path: str, content: Mapping[str, Any], overrides: list[str]) -> Experiment:
    """Return the experiment of a file's content. `path` is its name in messages. Raises UserError as above.

    Files with the user's code that the content names are looked for here, then beside the file.
    """
    _check_keys(content, Experiment, path, prefix="")
    _check_overrides(overrides)
    experiment = _parse(path, with_files_beside(content, Path(path).parent), overrides)
    check_values(experiment)
    return with_first_texts(experiment)


def with_changes(content: Mapping[str, Any], changes: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a copy of a file's content with other values at dotted keys such as `train.seed`.

    Raises UserError for a key below a plain value. Others are checked when the experiment is made.
    """
    result = copy.deepcopy(dict(content))
    for key, value in changes.items():
        *above, last = key.split(".")
        section: Any = result
        for name in above:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"{path}: {key}: there is no such key: '{name}' is a value without keys")
        section[last] = copy.deepcopy(value)
    return result


_GONE = {
    "corpus.text_field": "; it is gone: name the column of plain text as corpus.columns: {text: NAME}",
    "corpus.messages_field": "; it is gone: name the column of conversations as corpus.columns: {messages: NAME}",
    "cache.draws": "; it is gone: remove it, and give a lower cache.threshold instead "
    "(0.01 costs as much as a second draw at 0.02, and is better in every epoch)",
    "cache.exponent": "; it is gone: remove it (random draws come from the teacher's own distribution, "
    "which is unbiased; cache.scheme varopt has less noise)",
}
"""Keys of earlier releases, and the remedies."""


def _where(error: Any) -> str:
    """Return the place and problem of a YAML error, without the excerpt of the text."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as plain values, to be written."""
    return dataclasses.asdict(experiment)


def _check_keys(content: Mapping[Any, Any], kind: type, path: str, prefix: str) -> None:
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in content.items():
        if key not in known:
            hint, name = _GONE.get(f"{prefix}{key}") or did_you_mean(str(key), known), str(key)
            raise UserError(f"{path}: {prefix}{name if name.isprintable() else ascii(name)}: unknown key{hint}")
        section = _section(known[key])
        if section is not None:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key}: must be a mapping, got {value!r}")
            _check_keys(value, section, path, f"{prefix}{key}.")
        elif value is None and "None" not in str(known[key].type):
            raise UserError(f"{path}: {prefix}{key}: {NO_VALUE}")
        elif str(known[key].type).startswith("list") and not isinstance(value, list):
            raise UserError(f"{path}: {prefix}{key}: must be a list, got {value!r}")
        elif (item := _item(known[key])) is not None:
            for number, each in enumerate(value, start=1):
                if not isinstance(each, dict):
                    raise UserError(f"{path}: {prefix}{key}[{number}]: must be a mapping, got {each!r}")
                _check_keys(each, item, path, f"{prefix}{key}[{number}].")
        elif isinstance(value, str) and value.lower() in ("null", "~") and "None" in str(known[key].type):
            # jsonargparse would take the text for no value
            raise UserError(f"{path}: {prefix}{key}: is the text {value!r}: choose another, or leave the key out")
        elif isinstance(value, str):
            _check_text(f"{path}: {prefix}{key}", value, known[key])


def _check_text(key: str, value: str, field: dataclasses.Field) -> None:
    """Raise UserError for a text of several words for a number or a truth value: "3 # of them" would be taken for 3."""
    kind = re.sub(_ANNOTATED, r"\1", str(field.type)).removesuffix(" | None")
    kind = kind.removesuffix(" | Literal['auto']")
    if kind in ("int", "float", "bool") and len(value.split()) > 1:
        raise UserError(f"{key}: expected {kind}. Got value: {value!r}")


_NAMED: dict[str, Any] = vars(teacher_sections) | vars(configuration)


def _section(entry: dataclasses.Field) -> type | None:
    """Return the dataclass of a field that is a section of the file, None for a plain value."""
    kind = _NAMED.get(str(entry.type))
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _item(entry: dataclasses.Field) -> type | None:
    """Return the dataclass of the mappings in a field that is a list of them, None for any other field."""
    found = re.fullmatch(r"list\[(\w+)\]", str(entry.type))
    kind = _NAMED.get(found[1]) if found else None
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _check_overrides(overrides: list[str]) -> None:
    for argument, following in itertools.pairwise([*overrides, ""]):
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
                break  # a free mapping such as student.options: the plug-in checks its keys
            kind = _section(known[key]) or str
            walked += f"{key}." if dataclasses.is_dataclass(kind) else key
            if kind is str:
                _, has_value, value = argument.partition("=")
                _check_text(walked, value if has_value else following, known[key])


def _in_a_section(key: str) -> str:
    """Return `; did you mean '--train.seed'?` for a key that was given without its section."""
    sections = [
        entry.name
        for entry in dataclasses.fields(Experiment)
        if (kind := _section(entry)) and key in {field.name for field in dataclasses.fields(kind)}
    ]
    return f"; did you mean {' or '.join(f'--{section}.{key}' for section in sections)}?" if sections else ""


def print_options() -> None:
    """Print every key with its documentation, type, limits and default."""
    for section in dataclasses.fields(Experiment):
        kind = _section(section)
        if kind is None:
            continue
        print(f"{section.name}: {(kind.__doc__ or '').strip()}")
        documentation, hints = _field_documentation(kind), typing.get_type_hints(kind, include_extras=True)
        for entry in dataclasses.fields(kind):
            default = "required" if entry.default is dataclasses.MISSING else f"default {entry.default}"
            if entry.default_factory is not dataclasses.MISSING:
                default = f"default {entry.default_factory()}"
            limits = limits_of(hints[entry.name])
            plain = re.sub(_ANNOTATED, r"\1", str(entry.type)) + ("" if limits is None else f" {limits}")
            print(f"  --{section.name}.{entry.name}  ({plain}; {default})\n      {documentation[entry.name]}")
        print()
    documentation = _field_documentation(Experiment)
    for entry in dataclasses.fields(Experiment):
        if _section(entry) is None:
            print(f"  --{entry.name}  ({entry.type}; default {entry.default})\n      {documentation[entry.name]}")


def _field_documentation(kind: type) -> dict[str, str]:
    """Return the string below each field of a dataclass."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    documentation = {}
    for entry, following in itertools.pairwise(body):
        if isinstance(entry, ast.AnnAssign) and isinstance(following, ast.Expr):
            documentation[entry.target.id] = ast.literal_eval(following.value)  # type: ignore[union-attr]
    return documentation


def _parse(path: str, content: Mapping[str, Any], overrides: list[str]) -> Experiment:
    import argparse

    import jsonargparse

    # A mapping of class_path alone would be taken for the name of a subclass of the section's dataclass.
    filled = {
        key: {"options": {}, **value} if isinstance(value, dict) and value.keys() == {"class_path"} else value
        for key, value in content.items()
    }
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--experiment_file", action="config")
    parser.add_class_arguments(Experiment, None)
    try:
        namespace = parser.parse_args(["--experiment_file", _as_text(filled), *overrides])
        with quiet():
            values = parser.instantiate_classes(namespace)
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {_plain(str(error))}") from None
    names = [field.name for field in dataclasses.fields(Experiment)]
    return Experiment(**{name: getattr(values, name) for name in names})


def _as_text(content: dict[str, Any]) -> str:
    """Return YAML in which every text stands in quotes, so that none is a number to another reader (1e3)."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
    return yaml.dump(content, Dumper=Dumper)


_UNION = r"Does not validate against any of the Union subtypes Subtypes: \[(\w+), NoneType\] .*? Given value:"
_BOOL_OR_NAME = r"Does not validate against any of the Union subtypes Subtypes: \[bool, (one of .*?)\] .*? Given value:"
_INT_OR_NAME = r"Does not validate against any of the Union subtypes Subtypes: \[int, one of (.*?)\] .* Given value:"
_ANNOTATED = r"(?:typing\.)?Annotated\[(\w+), [^\]]*\]"


def _plain(message: str) -> str:
    """Return jsonargparse's message in one line, without the names of Python's types."""
    line = " ".join(message.split())
    if "Subclasses are disabled" in line:  # a section as one override, with its class_path alone
        line = line.split(":")[0] + ": give its class_path as --student.class_path or --teacher.class_path"
    line = re.sub(r'^Parser key "([^"]+)":', r"\1:", line)
    line = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", line)
    line = re.sub(_ANNOTATED, r"\1", re.sub(r"<class '(\w+)'>", r"\1", line))
    line = re.sub(_BOOL_OR_NAME, r"expected \1, true or false. Got value:", line)
    line = re.sub(_INT_OR_NAME, r"expected int or \1. Got value:", line)
    line = re.sub(_UNION, r"Expected a \1. Got value:", line)
    return line.replace("Expected a one of", "expected one of").replace("Expected a", "expected")
