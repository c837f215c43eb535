"""A student as one GGUF file, the format of llama.cpp: matrices rounded to a chosen type, tokenizer included."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import UserError, did_you_mean
from distill.export import gguf_architecture, gguf_check, gguf_families, gguf_tensors, gguf_tokenizer
from distill.models.checkpoints import Checkpoint, load_config
from distill.models.saving import DESCRIPTION
from distill.models.tokenizers import load_tokenizer
from distill.system.files import TEMPORARY, make_folder, sync_file, sync_folder
from distill.system.progress import say

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TYPES = ("f16", "q8_0", "q4_0")
"""Types of the stored matrices: 16, 8.5 and 4.5 bits a weight. Norms and biases are float32 in each. In q4_0 the
embedding and the head have 8.5 bits, because every token passes through them. There is no q4_1: its groups of weights
have no zero, so beside one large weight all the small ones get the same error, and the demo's student loses its
language.
"""
EMBEDDINGS = ("token_embd.weight", "output.weight")
IN_FULL = ("ffn_gate_inp", "shortconv.conv", "ssm_conv1d")
"""Parts of names of the small matrices that llama.cpp takes in float32: routers and convolutions."""
LARGEST_HALF = 65504.0
OLLAMA_CONTEXT = 4096
"""Tokens that Ollama keeps in sight when nobody says otherwise."""


def write(source: Path, folder: Path, type: str) -> None:
    """Write the student of the Hugging Face folder `source` as `<folder>/model-<type>.gguf`, replacing that file.

    `Modelfile-<type>` beside it is for Ollama.

    The smaller types store 32 weights at a time. Matrices whose rows are no multiple of 32 long stay at f16, and a line
    says so. Raises UserError for a family, a tokenizer or a model of a plug-in that llama.cpp cannot run, for weights
    beyond float16's range, and without the package gguf.
    """
    if type not in TYPES:
        raise UserError(f"--type {type}: unknown to --format gguf{did_you_mean(type, TYPES)}")
    _require_gguf()
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    checkpoint = _checkpoint(source)
    plan = gguf_families.plan(load_config(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    vocabulary = gguf_tokenizer.vocabulary(tokenizer)
    make_folder(folder)
    path = file(folder, type)
    temporary = path.with_name(path.name + TEMPORARY)
    writer = GGUFWriter(temporary, plan.family.architecture)
    try:
        writer.add_type("model")
        writer.add_name("Distilled student")  # llama.cpp treats some names specially
        writer.add_file_type(int(LlamaFileType[f"MOSTLY_{type.upper()}"]))
        if type != "f16":
            writer.add_quantization_version(GGML_QUANT_VERSION)
        gguf_architecture.add_hyperparameters(writer, plan, len(vocabulary.tokens))
        gguf_tokenizer.add_vocabulary(writer, vocabulary, tokenizer, plan.config)
        kept = _write_tensors(writer, plan, checkpoint, len(vocabulary.tokens), type)
        writer.close()
        sync_file(temporary)
        os.replace(temporary, path)
        modelfile(folder, type).write_text(_modelfile(path, tokenizer, plan.context), encoding="utf-8")
        sync_folder(folder)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    if kept:
        plan.notes.append(f"{len(kept)} matrices stay at f16, their rows being no multiple of 32 long ({kept[0]})")
    for note in (*plan.notes, *vocabulary.notes):
        say(f"gguf: {note}")
    # The folder has another name until the export is whole.
    say(f"gguf: for Ollama, in the export's folder: ollama create NAME -f {modelfile(folder, type).name}")


def check(source: Path, folder: Path, type: str, text: str | None = None) -> str:
    """Compare `<folder>/model-<type>.gguf` with the student of `source`, and say in one line what was found.

    With llama.cpp (the package xllamacpp), this compares tokens of difficult texts, greedy continuations of five
    prompts, and whole distributions on `text` (default: a passage kept here). Without it, transformers' reader of GGUF
    files is used. Raises UserError if the mean KL is above `gguf_check.FARTHEST`, if the perplexity
    is off by more than `gguf_check.TOLERANCES`, if a token of a text differs, and at f16 if a continuation differs
    (`gguf_check.Comparison` explains ties).
    """
    _require_gguf()
    return gguf_check.check(_checkpoint(source), file(folder, type), type, text)


def file(folder: Path, type: str) -> Path:
    """Return the path of the file of a type."""
    return folder / f"model-{type}.gguf"


def modelfile(folder: Path, type: str) -> Path:
    """Return the path of Ollama's description of the file of a type."""
    return folder / f"Modelfile-{type}"


def _modelfile(path: Path, tokenizer: Any, context: int) -> str:
    """Return Ollama's description of a file: its path, the token that ends an answer, and a context below Ollama's own.

    Ollama takes the chat template from the file if it knows it.
    """
    lines = [f"FROM ./{path.name}", f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}"]
    if context < OLLAMA_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf needs the package gguf: pip install 'distill-small-card[gguf]'") from error


def _checkpoint(source: Path) -> Checkpoint:
    if (source / DESCRIPTION).is_file():
        raise UserError(
            f"{source}: the model of a plug-in, which llama.cpp does not know "
            f"(known families: {', '.join(gguf_families.FAMILIES)}): use --format hf"
        )
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: holds no Hugging Face model (no config.json)")
    return Checkpoint(source, None, str(source))


def _write_tensors(
    writer: Any, plan: gguf_families.Plan, checkpoint: Checkpoint, vocab_size: int, type: str
) -> list[str]:
    """Write the list of tensors, then each content, one in memory at a time. Returns the names of those left at f16."""
    from gguf.quants import quant_shape_to_byte_shape

    tensors = list(gguf_tensors.converted(plan, checkpoint, vocab_size))
    kept = []
    for name, shape, _ in tensors:
        kind = stored_type(name, shape, type)
        if kind.name == "F16" and type != "f16":
            kept.append(name)
        stored = quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(stored))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, read in tensors:
        writer.write_tensor_data(_stored(name, read().numpy(), stored_type(name, shape, type)))
    return kept


def stored_type(name: str, shape: tuple[int, ...], type: str) -> GGMLQuantizationType:
    """Return the type in which a file of `type` stores a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or name.endswith(".bias") or any(part in name for part in IN_FULL):
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[("q8_0" if type.startswith("q4") and name in EMBEDDINGS else type).upper()]
    together, _ = GGML_QUANT_SIZES[wanted]  # weights that share a scale
    return wanted if shape[-1] % together == 0 else GGMLQuantizationType.F16


def _stored(name: str, values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    from gguf.quants import quantize

    if not np.isfinite(values).all():
        raise UserError(f"gguf: {name} has weights that are no numbers")
    if kind.name == "F16" and np.abs(values).max(initial=0.0) > LARGEST_HALF:
        raise UserError(f"gguf: {name} has weights beyond the range of f16: use --type q8_0")
    return np.ascontiguousarray(quantize(values, kind)).view(np.uint8)
