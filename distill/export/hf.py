"""The Hugging Face format: a folder that AutoModelForCausalLM and AutoTokenizer open without distill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from distill.errors import UserError
from distill.export import alone, custom, probe
from distill.models.chat_templates import save_untagged
from distill.models.checkpoints import Checkpoint, load_config, weight_files
from distill.models.generation import end_as
from distill.models.huggingface import load_pretrained
from distill.models.saving import DESCRIPTION
from distill.models.text_part import is_of_text
from distill.models.tokenizers import load_folder_tokenizer
from distill.system.quiet import quiet_transformers

TYPES = ("float32", "bfloat16", "float16")
SHARD = "5GB"
EXACT = 1e-4
"""Allowed difference of a logit if both sides compute with the same weights in float32."""
ROUNDED = {torch.float32: EXACT, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Allowed ‖ours − theirs‖ / ‖ours‖ if theirs computes in 16 bits throughout, which is 10 and 13 bits short of float32,
and each layer adds to the error. A real fault, unlike rounding, gives a value near 1.
"""
_HEADER_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class HuggingFaceFormat:
    """Weights in `type` (None: as trained), tokenizer, chat template, generation settings.

    A student that is no transformers model needs its own code beside the weights, and `with_code` allows that.
    """

    type: str | None = None
    with_code: bool = False
    class_path: str | None = None
    """The class of a student that is no built-in."""

    def write(self, source: Path, folder: Path) -> None:
        """Write the folder. Raises UserError for a custom student without `with_code`, or whose code needs more."""
        tokenizer = load_folder_tokenizer(source)
        dtype = stored_dtype(source) if self.type is None else getattr(torch, self.type)
        if (source / DESCRIPTION).is_file():
            custom.write(source, folder, dtype, tokenizer, self.with_code, self.class_path, SHARD)
        else:
            checkpoint = Checkpoint(source, None, str(source))
            config = load_config(checkpoint)
            if not is_of_text(config):
                raise UserError(
                    f"--format hf: no class of text in transformers opens a model of family {config.model_type}"
                )
            model = load_pretrained(checkpoint, dtype)
            end_as(model, tokenizer)
            with quiet_transformers():
                model.save_pretrained(folder, max_shard_size=SHARD)
        save_tokenizer(tokenizer, folder)

    def check(self, source: Path, folder: Path) -> str:
        """Compare the logits that transformers computes by itself with ours, on `probe.TEXTS`."""
        stored = stored_dtype(folder)
        limit = min(probe.LONGEST, probe.longest_input(source))
        rows = probe.encode(load_folder_tokenizer(source), limit)
        ours = probe.our_logits(probe.load_rounded(source, stored, self.class_path), rows)
        dtypes = ["auto"] if stored == torch.float32 else ["float32", "auto"]  # auto: what the folder itself asks for
        request = {"folder": str(folder), "texts": probe.TEXTS, "limit": limit, "dtypes": dtypes}
        theirs = _ask({**request, "trust": custom.is_custom(folder)})
        _compare_ids(rows, theirs)
        difference = probe.compare(ours, _of(theirs, dtypes[0]))
        said = (
            f"transformers alone against distill on {difference.positions} positions: "
            f"largest difference of a logit {difference.largest:.1e} (allowed {EXACT:.0e})"
        )
        if not difference.largest <= EXACT:
            raise UserError(f"the exported model answers otherwise: {said}")
        if custom.is_custom(folder):
            said += f"; its code needs {', '.join(custom.requirements(folder))} (requirements.txt)"
        return said if stored == torch.float32 else f"{said}; {self._rounded(source, stored, rows, theirs)}"

    def _rounded(self, source: Path, stored: torch.dtype, rows: list[list[int]], theirs: dict[str, Tensor]) -> str:
        """Compare the folder in its default type, which computes in 16 bits, with our student in float32."""
        ours = probe.our_logits(probe.load_rounded(source, torch.float32, self.class_path), rows)
        relative = probe.compare(ours, _of(theirs, "auto")).relative
        name = str(stored).removeprefix("torch.")
        said = f"computed in {name}, {relative:.1%} away from the student in float32 (allowed {ROUNDED[stored]:.0%})"
        if not relative <= ROUNDED[stored]:
            raise UserError(f"the exported model answers otherwise: {said}: choose another --type")
        return said


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the widest type of the weights in a folder, among the types that a model computes in."""
    found = set()
    for path in weight_files(Checkpoint(folder, None, str(folder))):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not iterable itself
    wide = [dtype for name, dtype in _HEADER_TYPES.items() if name in found]
    return wide[0] if len(wide) == 1 else torch.float32


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer without transformers' notes about how this one was opened."""
    for note in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(note, None)
    save_untagged(tokenizer, folder)


def _ask(request: dict[str, Any]) -> dict[str, Tensor]:
    """Return the answer of `alone`, run in a separate process. Raises UserError with its last line if it fails."""
    environment = {
        **os.environ,
        **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""},
        **{"TOKENIZERS_PARALLELISM": "false"},
    }
    done = subprocess.run(
        [sys.executable, "-I", alone.__file__],
        input=json.dumps(request).encode(),
        capture_output=True,
        env=environment,
    )
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise UserError(f"transformers alone cannot open it: {lines[-1] if lines else f'status {done.returncode}'}")
    return load_tensors(done.stdout)


def _of(answer: dict[str, Tensor], dtype: str) -> list[Tensor]:
    return [answer[f"{dtype}.{index}"] for index in range(sum(name.startswith("ids.") for name in answer))]


def _compare_ids(rows: list[list[int]], answer: dict[str, Tensor]) -> None:
    theirs = [ids.tolist() for ids in _of(answer, "ids")]
    if theirs != rows:
        raise UserError("the exported tokenizer makes other tokens of the same text")
