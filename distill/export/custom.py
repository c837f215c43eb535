"""A student of the user's own code as a Hugging Face folder that brings this code along."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill import __version__, plugins
from distill.errors import UserError
from distill.export import probe
from distill.models import documents_apart, isolation, language_model
from distill.models.generation import special_ids
from distill.models.saving import WEIGHTS, read_description
from distill.models.tokenizers import vocab_size
from distill.plugins import load_language_model

CONTRACT = "distill.models.language_model"
CARRIED = {"language_model": language_model, "documents_apart": documents_apart}
"""Modules of distill that go along with a student's code: the contract, and what it imports."""
WRAPPER = "modeling_student"
REQUIREMENTS = "requirements.txt"
OURS = "# SPDX-License-Identifier: Apache-2.0\n"
THEIRS = "# The student's own code: its licence is its author's to give.\n"


def is_custom(folder: Path) -> bool:
    """Tell whether an exported folder is opened with code of its own."""
    return (folder / f"{WRAPPER}.py").is_file()


def write(
    source: Path,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Any,
    with_code: bool,
    named: str | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write weights, configuration and code, for `from_pretrained(folder, trust_remote_code=True)`.

    `named` is the student's class where it is no built-in. Raises UserError without `with_code`, and for code that
    needs more of distill than the contract.
    """
    description = read_description(source)
    assert description is not None, "a student with code has a description"
    class_path = description["class_path"]
    if not with_code:
        raise UserError(
            f"{source}: {class_path} is code of its own and no transformers model: --with_code puts this code into the "
            "folder, and people then open it with trust_remote_code=True"
        )
    class_path = plugins.named_class(source, class_path, named)
    options = plugins.arguments(class_path, "student", description["options"], {"vocab_size": vocab_size(tokenizer)})
    model = load_language_model(source, class_path=class_path)
    _write_code(class_path, folder)
    _write_requirements(folder)
    _write_weights(source, folder, dtype, shard_size)
    configuration = _configuration(model, source, options, dtype, tokenizer)
    (folder / "config.json").write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    _write_generation_settings(folder, tokenizer)


def _configuration(
    model: Any, source: Path, options: dict[str, Any], dtype: torch.dtype, tokenizer: Any
) -> dict[str, Any]:
    tied = _tied(model, source)
    long_enough = probe.longest_input(source) >= isolation.LENGTH
    vocabulary = model.head.weight_VD.shape[0]
    return {
        "architectures": ["StudentForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{WRAPPER}.StudentConfig",
            "AutoModelForCausalLM": f"{WRAPPER}.StudentForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "isolates_documents": long_enough and isolation.isolates_documents(model, vocabulary, "cpu"),
        "model_type": "distill_student",
        "student_options": options,
        "tie_word_embeddings": bool(tied),
        "tied_weights": tied,
        "vocab_size": vocabulary,
        **special_ids(tokenizer),
    }


def _tied(model: Any, source: Path) -> dict[str, str]:
    """Return the tied weights: each name with the name under which the weight file holds it."""
    with safe_open(source / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(f"student.{name}")
    tied = {}
    for group in names.values():
        kept = next((name for name in group if name.removeprefix("student.") in saved), None)
        if kept is None:  # without an element: such ones share their place, and no file holds them
            continue
        tied.update({name: kept for name in group if name != kept})
    return tied


def _write_generation_settings(folder: Path, tokenizer: Any) -> None:
    import transformers

    transformers.GenerationConfig(use_cache=False, **special_ids(tokenizer)).save_pretrained(folder)


def _write_weights(source: Path, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Write the student's weights under their names inside the wrapper. A tied weight is written once."""
    from huggingface_hub import save_torch_state_dict

    weights = {
        f"student.{name}": value.to(dtype) if value.is_floating_point() else value
        for name, value in load_file(source / WEIGHTS).items()
    }
    save_torch_state_dict(weights, folder, max_shard_size=shard_size, metadata={"format": "pt"})


def _write_code(class_path: str, folder: Path) -> None:
    """Write the wrapper, the contract, and the student's file. Each says at its top where it comes from."""
    full = plugins.BUILT_IN["student"].get(class_path, class_path)
    file, name = _where(full)
    wrapper = Path(__file__).with_name(f"{WRAPPER}.py").read_text(encoding="utf-8")
    wrapper, count = re.subn(r"from \.student import Student .*", f"from .student import {name} as Student", wrapper)
    assert count == 1, "the wrapper has one such line"
    built_in = full.startswith("students.")
    sources = {
        WRAPPER: (OURS, wrapper),
        **{name: (OURS, _relative(inspect.getsource(module))) for name, module in CARRIED.items()},
        "student": (OURS if built_in else THEIRS, self_contained(file.read_text(encoding="utf-8-sig"), file)),
    }
    for module, (licence, source) in sources.items():
        origin = f"# Copied by distill {__version__} from {file.name if module == 'student' else 'its own sources'}.\n"
        (folder / f"{module}.py").write_text(licence + origin + source, encoding="utf-8")


def _write_requirements(folder: Path) -> None:
    """Write the packages that the folder's code imports, with their versions here, by which it will be checked."""
    known = importlib.metadata.packages_distributions()
    files = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.py"))]
    names = {module.split(".")[0] for tree in files for module in _imported(tree)} - {""} - sys.stdlib_module_names
    lines = {f"# {name}: of no installed package" for name in names - known.keys()}
    for package in (package for name in names for package in known.get(name, [])):
        lines.add(f"{package}=={importlib.metadata.version(package).partition('+')[0]}")  # of torch, without its build
    told = "# What this folder's code imports, in the versions that it was checked with.\n"
    (folder / REQUIREMENTS).write_text(told + "".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


def requirements(folder: Path) -> list[str]:
    """Return the packages that an exported folder's code imports, as `torch==2.13.0`."""
    lines = (folder / REQUIREMENTS).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def _relative(source: str) -> str:
    """Return the source of a carried module, with its imports of the others made relative."""
    return re.sub(rf"^from distill\.models\.({'|'.join(CARRIED)}) import", r"from .\1 import", source, flags=re.M)


def _where(class_path: str) -> tuple[Path, str]:
    """Return the file that defines a student, and its name there. The named module may only import the class."""
    factory = plugins.load(class_path, "student")
    module = sys.modules.get(getattr(factory, "__module__", ""))
    file, name = getattr(module, "__file__", None), class_path.rpartition(":")[2]
    if getattr(module, name, None) is not factory:
        name = getattr(factory, "__qualname__", "")
    if file is None or not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"{class_path}: its source file is not to be found: give it as path/file.py:Class")
    return Path(file), name


def self_contained(source: str, file: Path) -> str:
    """Return a student's source with its import of the contract made relative.

    Raises UserError for any other import of distill's packages, and for imports of files beside this one.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == CONTRACT and not node.level:
            pattern = rf"from\s+{re.escape(CONTRACT)}\s+import\b"
            lines[node.lineno - 1] = re.sub(pattern, "from .language_model import", lines[node.lineno - 1], count=1)
    result = "".join(lines)
    for module in _imported(ast.parse(result)):
        top = module.split(".")[0]
        ours = top in ("distill", "teachers", "students")
        if (ours or not top or (file.parent / f"{top}.py").is_file()) and module != ".language_model":
            raise UserError(
                f"{file}: imports {module}, and a file that goes along with a model must be self-contained: of distill "
                f"it may use `from {CONTRACT} import …`, and nothing that lies beside it"
            )
    return result


def _imported(tree: ast.AST) -> list[str]:
    """Return all modules that a source imports. Relative ones begin with a dot."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return found
