"""Packed documents attended to one by one: results as under the mask, and the mask itself wherever it says more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distill.models.documents_apart import documents_of
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.packed_attention import document_mask, masks_alone, runs_of

LENGTHS = [[9, 9, 1, 21], [13, 27], [20, 20]]
"""Documents of each row of 40 tokens."""


def packed() -> tuple[Tensor, Tensor]:
    """Return token ids and positions of the rows; the last row begins within a document."""
    positions_BL = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in LENGTHS])
    positions_BL[-1, :20] += 3
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50, positions_BL.shape, generator=generator), positions_BL


@contextmanager
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Note for each call of torch's attention whether it had a mask."""
    masked: list[bool] = []
    original = functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        masked.append(attn_mask is not None)
        return original(query, key, value, attn_mask, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        yield masked


def outcome(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Return hidden states, and all gradients of a sum of them that no position leaves out."""
    model.zero_grad()
    hidden_BLD = HuggingFaceLanguageModel(model).body(*packed())
    (hidden_BLD * torch.linspace(-1, 1, hidden_BLD.numel()).view_as(hidden_BLD)).sum().backward()
    return hidden_BLD.detach(), [one.grad for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize(
    ("family", "sizes", "ways"),
    [
        ("llama", {}, {False}),
        ("qwen3", {}, {False}),
        ("gpt_neox", {}, {False}),
        ("mistral", {"sliding_window": 8}, {True}),  # shorter than most documents
        ("mistral", {"sliding_window": 32}, {False}),  # longer than all of them
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, {True, False}),
    ],
)
def test_it_is_the_attention_under_the_mask(
    family: str, sizes: dict[str, Any], ways: set[bool], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, **sizes).double()
    with masks_alone(), attention_calls(monkeypatch) as masked:
        expected = outcome(model)
    assert set(masked) == {True}
    with attention_calls(monkeypatch) as masked:
        found = outcome(model)
    assert set(masked) == ways
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_mask_that_was_written_over_counts(
    mode: Any, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family may add to the mask in place: then it says more than its documents."""
    model = tiny_model("llama")

    def narrow(module: Any, args: Any, given: dict[str, Any]) -> None:
        given["attention_mask"][..., 0].logical_and_(torch.tensor(True))

    with mode(), attention_calls(monkeypatch) as masked:
        HuggingFaceLanguageModel(model).body(*packed())
    assert set(masked) == {False}
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
    with mode(), attention_calls(monkeypatch) as masked:
        HuggingFaceLanguageModel(model).body(*packed())
    assert set(masked) == {True}


def test_nothing_changes_for_models_that_run_by_themselves(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    HuggingFaceLanguageModel(model)
    ids_BL, positions_BL = packed()
    with attention_calls(monkeypatch) as masked:
        model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False)
    assert set(masked) == {True}


def test_the_mask_of_documents() -> None:
    _, positions_BL = packed()
    mask = document_mask(documents_of(positions_BL)[:, 2], *positions_BL.shape)[:, 0]
    for row, sizes in zip(mask, LENGTHS, strict=True):
        assert torch.equal(row, torch.block_diag(*(torch.ones(size, size) for size in sizes)).tril().bool())


def test_neighbours_of_one_length_are_one_run() -> None:
    lengths = torch.tensor([size for row in LENGTHS for size in row])
    assert runs_of(lengths) == [(2, 9), (1, 1), (1, 21), (1, 13), (1, 27), (2, 20)]
    assert runs_of(lengths[:1]) == [(1, 9)]
