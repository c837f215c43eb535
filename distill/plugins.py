"""Plug-ins, found by name (built-in, `package.module:Class`, `file.py:Class`), with checked options, and built."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from distill.errors import UserError, did_you_mean, first_line
from distill.system.blame import blame, failed
from distill.system.files import last_part, names_only
from distill.system.progress import say
from distill.system.sources import source_hash
from distill.system.values import fits, is_plain, type_hints

if TYPE_CHECKING:
    import torch

Kind = Literal["student", "teacher", "callback", "divergence", "metric", "reader"]

BUILT_IN: dict[str, dict[str, str]] = {
    "teacher": {
        "huggingface": "teachers.huggingface:load_teacher",
        "streamed": "teachers.streamed:load_streamed_teacher",
    },
    "student": {
        "compact": "students.compact:CompactDecoder",
        "huggingface": "students.huggingface:load_student",
        "lora": "students.lora:load_lora_student",
        "pruned": "students.pruned:prune_teacher",
    },
    "callback": {},
    "divergence": {},
    "metric": {},
    "reader": {},
}
SETTING = {
    "student": "student.class_path",
    "teacher": "teacher.class_path",
    "callback": "train.callbacks",
    "divergence": "loss.divergence",
    "metric": "evaluate.metric",
    "reader": "corpus.reader",
}
"""Key of the experiment file that names a plug-in, for messages."""
OPTIONS = {"student": "student.options", "teacher": "teacher.options", "callback": "train.callbacks: init_args"}
"""Key of the experiment file that holds its arguments."""
FORMS = "package.module:Class or path/file.py:Class"


def load(reference: str, kind: Kind) -> Callable[..., Any]:
    """Return the callable that a reference names: a built-in, `package.module:Class`, or `path/file.py:Class`."""
    table = BUILT_IN[kind]
    full = table.get(reference, reference)
    module_name, colon, attribute = full.rpartition(":")
    if not colon or not module_name or not attribute:
        raise UserError(
            f"{SETTING[kind]} '{reference}': unknown{did_you_mean(reference, table) if table else ''}, or give {FORMS}"
        )
    module = _from_file(module_name, kind) if module_name.endswith(".py") else _from_package(module_name, kind)
    found = getattr(module, attribute, None)
    if found is None:
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{SETTING[kind]}: {module_name} has no '{attribute}'{did_you_mean(attribute, own)}")
    if not callable(found):
        raise UserError(f"{SETTING[kind]}: {full} is not a class or function")
    if kind in ("student", "teacher") and reference not in table and not module_name.endswith(".py"):
        _check_is_model(found, f"{SETTING[kind]}: {full}")
    return typing.cast("Callable[..., Any]", found)


def _check_is_model(found: Any, where: str) -> None:
    """Raise UserError unless the class is a model: a model's folder names it, and must not call arbitrary code."""
    import torch

    if not (inspect.isclass(found) and issubclass(found, torch.nn.Module)):
        raise UserError(f"{where} is not a torch.nn.Module class (a function must be in a file: path/file.py:function)")


def _from_package(name: str, kind: Kind) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a file of the user's hides no installed module
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"{SETTING[kind]}: importing {name} failed: {error}") from error
        parent = Path(*name.split(".")[:-1])
        near = [".".join((*parent.parts, file.stem)) for file in parent.glob("*.py") if file.stem != "__init__"]
        raise UserError(
            f"{SETTING[kind]}: no module '{name}' here or installed" + (did_you_mean(name, near) if near else "")
        ) from error
    except BaseException as error:  # a stranger's module may fail in any way while it is imported
        if not failed(error):
            raise
        raise UserError(f"{SETTING[kind]}: importing {name} failed: {blame(error)}") from error


def _from_file(name: str, kind: Kind) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        near = [str(Path(name).parent / file.name) for file in path.parent.glob("*.py")]
        raise UserError(f"{SETTING[kind]}: no file '{name}'" + (did_you_mean(name, near) if near else ""))
    module_name = f"_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # a stranger's file may fail in any way while it is imported
        del sys.modules[module_name]
        if not failed(error):
            raise
        raise UserError(f"{SETTING[kind]}: importing {name} failed: {blame(error)}") from error
    return module


def arguments(reference: str, kind: Kind, options: dict[str, Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of the plug-in's call: the user's checked `options`, and those of `offered` that it names.

    Text that a command line gave for a number is read as one. Raises UserError for an unknown, missing or ill-typed
    option.
    """
    factory = load(reference, kind)
    where = f"{OPTIONS[kind]} of {reference}"
    try:
        signature = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{SETTING[kind]}: {reference} does not say which arguments it takes: {error}") from error
    parameters = {
        name: parameter
        for name, parameter in signature.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    hints = type_hints(factory)
    chosen: dict[str, Any] = {}
    for name, value in options.items():
        if name not in parameters and not takes_any:
            raise UserError(f"{where}: unknown option '{name}'{did_you_mean(name, parameters)}")
        chosen[name] = _checked(value, hints.get(name, Any), f"{where}: {name}")
    chosen.update({name: offered[name] for name in parameters if name in offered and name not in chosen})
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in chosen]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)} (known: {', '.join(sorted(parameters))})")
    return chosen


def declared(reference: str, kind: Kind, name: str) -> Any:
    """Return a declaration of a plug-in (`distill.models.shapes.declare`) by name, or None."""
    return getattr(load(reference, kind), name, None)


def build(reference: str, kind: Kind, options: dict[str, Any], offered: dict[str, Any]) -> Any:
    """Call the plug-in with its `arguments`; the result is a `torch.nn.Module` with the two members of the contract."""
    from distill.models.contract import check_members
    from distill.models.shapes import finder

    chosen = arguments(reference, kind, options, offered)
    factory, name = load(reference, kind), f"{kind} {reference}"
    if finder() is not None and (shape := declared(reference, kind, "without_weights")):
        factory, taken = shape, inspect.signature(shape).parameters
        chosen = {name: value for name, value in chosen.items() if name in taken}
    try:
        model = factory(**chosen)
    except UserError:
        raise
    except BaseException as error:
        if not failed(error):
            raise
        meant = isinstance(error, (ValueError, TypeError))
        # A stranger's constructor may fail in any way; without memory, also in ways that it does not on a device.
        if reference not in BUILT_IN[kind] and (meant or finder() is None):
            called = factory.__init__ if inspect.isclass(factory) else factory
            raise UserError(f"{name}: its constructor failed: {blame(error, called)}") from error
        if meant:
            raise UserError(f"{name}: {first_line(error)}") from error
        raise
    check_members(model, name)
    return model


def load_language_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    class_path: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Return the language model that `save_language_model` wrote, or any Hugging Face folder's, in evaluation mode.

    `dtype` defaults to float32, and is that where the model's own code fails in 16 bits. A model with a `student.json`
    is built again by its plug-in and given its weights. A folder may come from anyone, so a class that is no built-in
    must be the `class_path` that the user named. `options` say in full where a path is of which the folder has the name
    alone.
    """
    import torch

    from distill.models.contract import in_type
    from distill.system.staging import recover

    folder, dtype = Path(folder), dtype or torch.float32
    recover(folder)

    def make(kind: torch.dtype) -> Any:
        return _loaded(folder, kind, class_path, options or {}).to(device=device, dtype=kind).eval()

    return in_type(make, dtype, str(folder))


def _loaded(folder: Path, dtype: torch.dtype, class_path: str | None, options: dict[str, Any]) -> Any:
    from distill.models import saving
    from distill.models.tokenizers import load_folder_tokenizer, vocab_size

    description = saving.read_description(folder)
    model: Any
    if description is None:
        model = saving.load_hugging_face(folder, dtype)
    else:
        description["class_path"] = named_class(folder, description["class_path"], class_path)
        offered = {"vocab_size": vocab_size(load_folder_tokenizer(folder))}
        known = {**description["options"], **_in_full(description["options"], options)}
        try:
            model = build(description["class_path"], "student", known, offered)
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise UserError(
                f"{error}; of a path in its options a model's folder keeps the last part alone: run this in the folder "
                "where that file lies"
            ) from error
        saving.load_weights(model, folder, description)
        if description.get("source") not in (None, source_of(description["class_path"], "student")):
            say(f"{folder}: the code of {description['class_path']} has changed since this model was trained")
    return model


def _in_full(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in saved and saved[name] == names_only(value)}


def named_class(folder: Path, wanted: str, named: str | None) -> str:
    """Return the class that builds a folder's model: the built-in that it `wanted`, or the one that the user `named`.

    Raises UserError when the user has not named it, and for a built-in that opens other checkpoints: its models are
    saved as Hugging Face folders.
    """
    if is_built_in(wanted, "student"):
        if "trust_remote_code" in inspect.signature(load(wanted, "student")).parameters:
            raise UserError(f"{folder}: its student.json names '{wanted}', which opens other checkpoints: not loaded")
        return wanted
    if named is None:
        raise UserError(
            f"{folder}: its student.json asks for the code of {wanted}: if you trust it, name it: --class_path {wanted}"
        )
    if last_part(named) != last_part(wanted):
        raise UserError(f"{folder}: its student.json asks for the code of {wanted}, and not of {named}: not loaded")
    return named


def _checked(value: Any, hint: Any, where: str) -> Any:
    if fits(value, hint):
        return value
    if isinstance(value, str):  # `--student.options.layers 4`, or `1e-3`, which YAML 1.1 reads as text
        try:
            number = json.loads(value)
        except json.JSONDecodeError:
            number = None
        if number is not None and fits(number, hint):
            return number
    name = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint).replace("typing.", "")
    raise UserError(f"{where}: expected {name}, got {value!r}")


def source_of(reference: str, kind: Kind) -> str:
    """Return the hash of a plug-in's source: the file that was named, and the one that defines the class."""
    found = load(reference, kind)
    name = BUILT_IN[kind].get(reference, reference).rpartition(":")[0]
    modules = [sys.modules.get(each) for each in (name, getattr(found, "__module__", ""))]
    files = [Path(name).expanduser()] if name.endswith(".py") else []
    files += [Path(file) for module in modules if (file := getattr(module, "__file__", None))]  # builtins have none
    return source_hash([file for file in files if file.is_file()])


def is_built_in(reference: str, kind: Kind) -> bool:
    """Tell whether a plug-in is one of those that come with this version."""
    return reference in BUILT_IN[kind] or reference in BUILT_IN[kind].values()


def defaults(reference: str, kind: Kind) -> dict[str, Any]:
    """Return the options of a plug-in with their default values, as far as these are plain and of their types."""
    factory = load(reference, kind)
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    hints, found = type_hints(factory), {name: parameter.default for name, parameter in parameters.items()}
    return {
        name: value
        for name, value in found.items()
        if value is not inspect.Parameter.empty and is_plain(value) and fits(value, hints.get(name, Any))
    }
