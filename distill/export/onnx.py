"""The ONNX format: a graph of the whole model, from token ids to logits, of any batch and length.

Shapes: B batch, L sequence length, N positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.export import onnx_tracing, probe
from distill.export.hf import save_tokenizer
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import hidden_states
from distill.models.tokenizers import load_folder_tokenizer
from distill.plugins import load_language_model
from distill.system.quiet import quiet

TYPES = ("float32",)
FILE = "model.onnx"
INPUT, OUTPUT = "input_ids", "logits"
ALLOWED = 1e-3
"""Allowed difference of a logit between torch and onnxruntime, both in float32."""
TRACED = (2, 8)
"""Rows and tokens of the traced input. The check takes others."""
ONE_FILE = 1_900_000_000
"""Largest weights in bytes that lie in the graph's own file, which can have 2 GiB."""
_LONGEST_REASON = 600
"""Largest number of characters of torch's reason for a refusal: two sentences take 300."""
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxFormat:
    """Format of `model.onnx` in float32, with tokenizer and configuration beside it."""

    class_path: str | None = None
    """The class of a student that is no built-in."""

    def __post_init__(self) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime reads it once, when it is imported
        for library in _LIBRARIES:
            try:
                importlib.import_module(library)
            except ImportError:
                raise UserError(
                    f"--format onnx needs {library}, which is not installed: pip install {' '.join(_LIBRARIES)}"
                ) from None

    def write(self, source: Path, folder: Path) -> None:
        """Write the folder. Raises UserError for a model that torch's exporter cannot trace or translate."""
        model = load_language_model(source, class_path=self.class_path)
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        with quiet(prints=True):  # the exporter tells of every step, and of libraries that it can do without
            forward = _HuggingFaceForward(model) if isinstance(model, HuggingFaceLanguageModel) else _Forward(model)
            program = _translated(_traced(forward, model.head.weight_VD.shape[0], _sizes(source), str(source)))
            _forget_the_way(program.model)
            program.save(str(folder / FILE), external_data=size > ONE_FILE)
        save_tokenizer(load_folder_tokenizer(source), folder)
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)

    def check(self, source: Path, folder: Path) -> str:
        """Compare the logits that onnxruntime computes on the CPU with ours, at sizes that were not traced."""
        import onnxruntime

        tokenizer = load_folder_tokenizer(source)
        tokens = [token for row in probe.encode(tokenizer) for token in row]
        onnxruntime.set_default_logger_severity(3)
        session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
        model = load_language_model(source, class_path=self.class_path)
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for rows, length in _sizes(source):
            ids_BL = torch.tensor(
                [tokens[(row + place) % len(tokens)] for row in range(rows) for place in range(length)]
            )
            ids_BL = ids_BL.view(rows, length)
            ours += probe.our_logits(model, ids_BL.tolist())
            theirs += list(torch.from_numpy(session.run([OUTPUT], {INPUT: ids_BL.numpy()})[0]))
        difference = probe.compare(ours, theirs)
        shapes = ", ".join(f"{rows} x {length}" for rows, length in _sizes(source))
        said = (
            f"onnxruntime against distill on {difference.positions} positions (inputs of {shapes} tokens): "
            f"largest difference of a logit {difference.largest:.1e} (allowed {ALLOWED:.0e})"
        )
        if not difference.largest <= ALLOWED:
            raise UserError(f"the exported model answers otherwise: {said}")
        return said


class _HuggingFaceForward(torch.nn.Module):
    """A transformers model's own way to its logits. It builds its masks itself when it is traced."""

    def __init__(self, model: HuggingFaceLanguageModel) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class _Forward(torch.nn.Module):
    """Any other model's way to its logits. Each row is one text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.answers: tuple[Any, ...] | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        rows, length = input_ids.shape
        positions_BL = torch.arange(length, device=input_ids.device).expand(rows, -1)
        known = contextlib.nullcontext() if self.answers is None else onnx_tracing.Repeat(self.answers)
        with known:
            return self.model.head(hidden_states(self.model, input_ids, positions_BL))


def _sizes(source: Path) -> list[tuple[int, int]]:
    """Return rows and tokens to try: a single token, odd ones, a long text, and one beyond a sliding window."""
    limit = probe.longest_input(source)
    configuration = source / "config.json"
    window = (
        json.loads(configuration.read_text(encoding="utf-8")).get("sliding_window") if configuration.is_file() else 0
    )
    lengths = [(1, 1), (2, 2), (3, 5), (2, 17), (1, min(limit, 100))]
    if isinstance(window, int) and 100 < window + 8 <= min(limit, 2048):
        lengths.append((1, window + 8))
    return [(rows, length) for rows, length in lengths if length <= limit]


def _traced(forward: torch.nn.Module, vocabulary: int, sizes: list[tuple[int, int]], name: str) -> Any:
    """Return the model as torch.export's program. Raises UserError with the exporter's reason, shortened."""
    rows, length = TRACED[0], min(TRACED[1], max(length for _, length in sizes))
    ids_BL = (torch.arange(rows * length) * 5 % vocabulary).view(rows, length)
    # min=3: at length 2 a difference of neighbours has one element, which broadcasts, and the tracer would make that a
    # special case. The graph itself needs none; the check runs it at lengths 1 and 2.
    shapes = {INPUT: {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", min=3)}}
    try:
        if isinstance(forward, _Forward):
            forward.answers = onnx_tracing.answers(forward, [*sizes, (rows, length)], vocabulary)
        return torch.export.export(forward, (ids_BL,), dynamic_shapes=shapes, strict=False)
    except onnx_tracing.Undecided as error:
        raise UserError(f"{name}: an ONNX graph is the same for all texts, and this model is not: {error}") from error
    except Exception as error:  # the tracer runs the model's code, which may raise anything
        raise UserError(f"{name}: torch.export cannot trace this model for ONNX: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the exporter's reason on one line: all of it up to the user's code, without hints about its own logs."""
    text = re.sub(r"For (more|extended) [^,]*, [^\n]*", "", str(error))
    text = re.split(r"\n\s*(?:User [Ss]tack|User code|The following call|Suggested fixes|from user code)", text)[0]
    words = " ".join(text.split()) or type(error).__name__
    return textwrap.shorten(words, _LONGEST_REASON, placeholder=" …")


def _forget_the_way(model: Any) -> None:
    """Remove the exporter's notes: for each node the Python lines it came from, with the paths of this machine."""
    for part in (model, model.graph, *model.functions.values()):
        part.doc_string = None
        part.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        values = [*graph.inputs, *getattr(graph, "initializers", {}).values()]
        for node in graph.all_nodes():
            node.doc_string = None
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.doc_string = None
            value.metadata_props.clear()


def _translated(program: Any) -> Any:
    try:
        return torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch", 1: "sequence"}},
            verbose=False,
        )
    except Exception as error:  # the translation runs the exporter's code on any graph
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"torch's exporter has no ONNX for this model: {_reason(cause)}") from error
