"""A student made by distill as a model of transformers: body and head behind the interface of a causal language model.

Exports copy this file beside the student's own `student.py`. distill itself never imports it.

Shapes: B batch, L sequence length, V vocabulary.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .language_model import hidden_states  # type: ignore[import-not-found]  # a copy of models/language_model.py
from .student import Student  # type: ignore[import-not-found]  # the export writes the student's own name here


class StudentConfig(PretrainedConfig):
    """Arguments that the student was made with."""

    model_type = "distill_student"

    def __init__(
        self,
        student_options: dict[str, Any] | None = None,
        tied_weights: dict[str, str] | None = None,
        isolates_documents: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.student_options = student_options or {}
        self.tied_weights = tied_weights or {}  # name → the name that is in the weight file
        self.isolates_documents = isolates_documents


class StudentForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the student. It keeps no keys and values: each generated token reads the whole text again."""

    config_class = StudentConfig
    main_input_name = "input_ids"

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.student: Any = _made(config.student_options)
        # Loading forgets buffers that are not saved, so the values that the constructor computed are put back.
        self._computed = {
            name: buffer.clone()
            for name, buffer in self.named_buffers()
            if name.rpartition(".")[2] in self.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
        }
        self._tied_weights_keys = {_exactly(name): _exactly(source) for name, source in config.tied_weights.items()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for prefix, known in self.named_modules():
            if known is module:
                for name, buffer in module.named_buffers(recurse=False):
                    value = self._computed.get(f"{prefix}.{name}" if prefix else name)
                    if value is not None:
                        buffer.copy_(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Return logits `[B, L, V]`, and with `labels` (the ids; -100 is left out) the mean loss of the next token.

        Padding on the right needs no mask. The mask tells padding on the left, which students that can isolate
        documents treat as a document of its own.
        """
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask)
        logits = self.student.head(hidden_states(self.student, input_ids, position_ids))
        loss = None
        if labels is not None:
            next_NV = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(next_NV, labels[:, 1:].flatten().to(logits.device), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]  # it needs no more than these
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return positions that begin at 0 with the row, and again at 0 after padding on the left."""
        plain_BL = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        if attention_mask is None or bool(attention_mask[:, 0].all()):
            return plain_BL
        if not self.config.isolates_documents:
            raise ValueError("this model cannot tell padding on the left from text: pad on the right, or not at all")
        padding_B1 = (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)
        return torch.where(plain_BL < padding_B1, plain_BL, plain_BL - padding_B1)


def _made(options: dict[str, Any]) -> nn.Module:
    """Make the student as its constructor does, then convert it to the wanted type.

    transformers constructs models without memory and in the type of the weights. A student's constructor may compute
    values, and these are rounded once, at the end.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return Student(**options).to(dtype)
    finally:
        torch.set_default_dtype(dtype)


def _exactly(name: str) -> str:
    """Return the pattern that matches one name, because transformers reads patterns."""
    return re.escape(name) + "$"
