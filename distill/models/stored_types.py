"""The types in which a checkpoint's weights are stored, where its configuration says nothing of a quantisation."""

from __future__ import annotations

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, weight_files
from distill.models.tensor_files import TensorFile
from distill.system.progress import say

_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4")
"""Types of codes: their numbers are no weights."""
_WEIGHTS = ("weight", "_proj", "_packed", "_blocks")
"""Endings of weights' names. Masks and positions are stored as whole numbers too."""


def check_stored_types(checkpoint: Checkpoint) -> None:
    """Raise UserError for weights of a plain checkpoint that are codes: whole numbers, or fp8 with scales beside it.

    Weights in fp8 without scales may be a cast, and are taken as they are: one line says so.
    """
    if checkpoint.gguf_file is not None or checkpoint.is_copy:
        return
    types: dict[str, str] = {}
    for file in map(TensorFile, weight_files(checkpoint)):
        types |= {name: file.type(name) for name in file.names() if len(file.shape(name)) > 1}
        types |= {name: "" for name in file.names() if name not in types}
    codes = [name for name, kind in types.items() if kind in _WHOLE and name.endswith(_WEIGHTS)]
    small = [name for name, kind in types.items() if kind.startswith("F8_") and name.endswith(_WEIGHTS)]
    layers = {name.rpartition(".")[0] for name in small}
    scales = [name for name in types if "scale" in name.rpartition(".")[2] and name.rpartition(".")[0] in layers]
    if codes or scales:
        first, count = (codes or small)[0], len(codes or small)
        beside = "" if codes else f", with {scales[0]} beside it"
        more = f" (so are {count - 1:,} more)" if count > 1 else ""
        raise UserError(
            f"{checkpoint.name}: {first} is stored as {types[first]}{beside}{more}, and config.json has no "
            "quantization_config that explains it: fetch the folder anew, or name the unquantised checkpoint"
        )
    if small:
        say(f"{checkpoint.name}: {len(small):,} weights are in fp8 without scales: they are taken as they are")
