"""The one contract that teachers and students meet: a language model is a body and a head.

Shapes: B batch, L sequence length, N positions, V vocabulary, D hidden size; R, M, T as in `documents_apart`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.models.documents_apart import Group, split


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: `soft_cap * tanh(z / soft_cap)` of `z = scale * (hidden @ weight.T + bias)`.

    The two transformations are those that published families use: `scale` (Granite divides, Cohere multiplies) and
    `soft_cap` (Gemma 2). Families without them leave `scale` at 1 and `soft_cap` at None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return logits `[..., V]` of hidden states `[..., D]`, in the dtype of the product.

        Hidden states of another dtype than the weight's are cast (Mamba's residual stream is float32 in any model).
        """
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        return self.transform(torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V))

    def product(self, hidden_ND: Tensor, out_NV: Tensor) -> Tensor:
        """Write the matrix product (with bias) of `[N, D]` into `out_NV`, and return that. It has no gradient."""
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        if self.bias_V is None:
            return torch.mm(hidden_ND, self.weight_VD.T, out=out_NV)
        return torch.addmm(self.bias_V, hidden_ND, self.weight_VD.T, out=out_NV)

    def transform(self, product_NV: Tensor) -> Tensor:
        """Transform the matrix product (with bias) into logits: scale, then soft cap."""
        logits = product_NV if self.scale == 1.0 else product_NV * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def transform_(self, product_NV: Tensor) -> Tensor | float:
        """Transform the product in place; return the logits' derivative in it, a number or `[.., V]`."""
        if self.scale != 1.0:
            product_NV.mul_(self.scale)
        if self.soft_cap is None:
            return self.scale
        product_NV.div_(self.soft_cap).tanh_()
        slope_NV = product_NV.square().neg_().add_(1).mul_(self.scale)
        product_NV.mul_(self.soft_cap)
        return slope_NV

    def to(self, device: torch.device) -> Head:
        """Return the same head on another device."""
        bias = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias)

    def with_rows(self, vocab_size: int) -> Head:
        """Return the same head over the first `vocab_size` rows: padded rows take no part in any distribution.

        Raises ValueError if the head has fewer rows than the vocabulary.
        """
        check_rows(self.weight_VD.shape[0], vocab_size)
        if self.weight_VD.shape[0] == vocab_size:  # a view of all rows would copy the gradient of them all
            return self
        bias = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VD=self.weight_VD[:vocab_size], bias_V=bias)


def check_rows(rows: int, vocab_size: int) -> None:
    """Raise ValueError when a matrix with a row a token has fewer rows than the vocabulary has tokens."""
    if rows < vocab_size:
        raise ValueError(f"the head has {rows} rows, the tokenizer {vocab_size} tokens: not the same vocabulary")


BodyOutput = Tensor | tuple[Tensor, Tensor | None]
"""Hidden states `[B, L, D]`, or these and an auxiliary loss."""


@runtime_checkable
class LanguageModel(Protocol):
    """The members that teachers and students share. Any `torch.nn.Module` with these two is a language model.

    `head` is read anew at every use, so a property that wraps the current parameters is right.
    """

    @property
    def head(self) -> Head: ...

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> BodyOutput:
        """Return hidden states `[B, L, D]` of token ids `[B, L]`; `position_ids` restart at 0 where a document begins.

        A student in training may also return an auxiliary loss, as `(hidden_BLD, auxiliary_loss)`: for example the
        balance of a mixture of experts, times its coefficient. It is a scalar, summed over the pass: over all B * L
        tokens, whether they carry loss or not. The step's loss gets the sum over its passes, divided by the tokens of
        all its samples. So a balance that is a mean over the tokens of one row is returned as `L * mean`, added up
        over the rows. Whatever adds up over rows has the same gradient for every micro-batch, accumulation and number
        of devices; a balance over the rows of a pass together depends on the micro-batch by its nature.
        """
        ...


def split_output(output: BodyOutput) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states and, if there is one, the auxiliary loss from a body's output."""
    return output if isinstance(output, tuple) else (output, None)


ONE_DOCUMENT_A_ROW = "one_document_a_row"
"""The attribute of a model in which documents that share a row see one another, so that each gets a row of its own."""


def run_body(model: LanguageModel, input_ids_BL: Tensor, position_ids_BL: Tensor) -> BodyOutput:
    """Return the output of a model's body, for a batch whose documents do not see one another.

    Most bodies keep them apart by their positions. A model with the attribute `ONE_DOCUMENT_A_ROW` gets each document
    in a row of its own (`documents_apart`); its auxiliary loss is then the sum over these passes. A model with a method
    `bodies` (groups of rows → hidden states of each) runs them together, as a teacher that reads its layers from disk.
    """
    if not getattr(model, ONE_DOCUMENT_A_ROW, False):
        return model.body(input_ids_BL, position_ids_BL)
    groups, places_T = _apart(model, input_ids_BL, position_ids_BL)
    return _joined(_run(model, groups), places_T, input_ids_BL)


def _apart(model: LanguageModel, input_ids_BL: Tensor, position_ids_BL: Tensor) -> tuple[list[Group], Tensor]:
    """Return the documents of a batch as groups of rows, and the place of each token among theirs."""
    # Each pass of a model whose weights are shared out (torch's FSDPModule) gathers them from all devices: one a batch.
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return split(input_ids_BL, position_ids_BL, any(hasattr(module, "unshard") for module in modules))


def _run(model: LanguageModel, groups: list[Group]) -> list[BodyOutput]:
    together: Callable[[list[Group]], list[BodyOutput]] | None = getattr(model, "bodies", None)
    return [model.body(*group) for group in groups] if together is None else together(groups)


def _joined(outputs: list[BodyOutput], places_T: Tensor, input_ids_BL: Tensor) -> BodyOutput:
    """Return the output of a batch from those of its documents' groups."""
    parts = [split_output(output) for output in outputs]
    hidden_TD = torch.cat([hidden_RMD.flatten(0, 1) for hidden_RMD, _ in parts])
    hidden_BLD = hidden_TD.index_select(0, places_T).unflatten(0, input_ids_BL.shape)
    losses = [loss for _, loss in parts if loss is not None]
    return (hidden_BLD, torch.stack(losses).sum()) if losses else hidden_BLD


def hidden_states(model: LanguageModel, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
    """Return the hidden states `[B, L, D]` of a model's body, without an auxiliary loss."""
    return split_output(run_body(model, input_ids_BL, position_ids_BL))[0]


def hidden_states_of(model: LanguageModel, batches: list[Group]) -> list[Tensor]:
    """Return the hidden states of several batches, token ids and positions of each.

    They are those that each batch has alone. A model with a method `bodies` runs all of them together.
    """
    if len(batches) == 1:
        return [hidden_states(model, *batches[0])]
    if not getattr(model, ONE_DOCUMENT_A_ROW, False):
        return [split_output(output)[0] for output in _run(model, batches)]
    apart = [_apart(model, *batch) for batch in batches]
    outputs = iter(_run(model, [group for groups, _ in apart for group in groups]))
    return [
        split_output(_joined([next(outputs) for _ in groups], places_T, batch[0]))[0]
        for (groups, places_T), batch in zip(apart, batches, strict=True)
    ]
