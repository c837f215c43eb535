"""Activation checkpointing: the same gradients and names, every block computed a second time."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.system.seeds import seed_all
from distill.training.activation_checkpointing import blocks, checkpoint_blocks


def gradients(student: Any) -> list[Tensor]:
    ids_BL = torch.arange(22).reshape(2, 11)
    student.head(student.body(ids_BL, ids_BL)).square().mean().backward()
    return [parameter.grad for parameter in student.parameters()]


def test_it_recomputes_and_changes_nothing(make_student: Callable[[], Any]) -> None:
    plain, checkpointed = make_student(), make_student()
    names = list(checkpointed.state_dict())
    assert checkpoint_blocks(checkpointed) == 3
    assert list(checkpointed.state_dict()) == names == list(plain.state_dict())
    expected, found = gradients(plain), gradients(checkpointed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert [block.runs for block in plain.blocks] == [1, 1, 1]
    assert [block.runs for block in checkpointed.blocks] == [2, 2, 2]


def test_activations_inside_blocks_are_not_kept(make_student: Callable[[], Any]) -> None:
    def kept(student: Any) -> int:
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            student.body(torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long))
        return sum(saved)

    plain, checkpointed = make_student(), make_student()
    checkpoint_blocks(checkpointed)
    assert kept(checkpointed) < kept(plain)


def test_without_gradients_nothing_is_recomputed(make_student: Callable[[], Any]) -> None:
    student = make_student()
    checkpoint_blocks(student)
    with torch.no_grad():
        student.body(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    assert [block.runs for block in student.blocks] == [1, 1, 1]


def test_dropout_repeats_itself() -> None:
    """The second run draws the same random numbers as the first."""

    def grads(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"blocks": nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in "ab"])}
        )
        if checkpointed:
            checkpoint_blocks(model)
        hidden = torch.ones(4, 8, requires_grad=True)
        for block in model["blocks"]:  # type: ignore[attr-defined]
            hidden = block(hidden)
        hidden.sum().backward()
        return [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads(True), grads(False), strict=True))


class Scaled(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 4), draw

    def forward(self, hidden_BD: Tensor) -> Tensor:
        return torch.tanh(self.linear(hidden_BD) * self.draw())


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_draws_of_python_and_numpy_repeat_themselves(draw: Callable[[], float]) -> None:
    gradients, after = [], []
    for recomputed in (False, True):
        seed_all(1)
        model = nn.ModuleDict({"blocks": nn.ModuleList([Scaled(draw) for _ in range(3)])})
        if recomputed:
            assert checkpoint_blocks(model) == 3
        seed_all(2)
        hidden_BD = torch.ones(2, 4)
        for block in model["blocks"].children():
            hidden_BD = block(hidden_BD)
        hidden_BD.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        after.append(draw())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
    assert after[0] == after[1], "what is drawn afterwards is the same too"


def test_a_copy_uses_its_own_weights(make_student: Callable[[], Any]) -> None:
    student = make_student()
    checkpoint_blocks(student)
    other = copy.deepcopy(student)
    with torch.no_grad():
        student.blocks[0].linear.weight.fill_(9)
    gradients(other)
    assert student.blocks[0].linear.weight.grad is None and other.blocks[0].linear.weight.grad is not None


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="ModuleList"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="ModuleList"):
        checkpoint_blocks(nn.ModuleList([nn.Linear(2, 2), nn.Tanh()]))


def test_lists_inside_blocks_are_not_the_blocks() -> None:
    """A layer's experts are more than the layers, and parts of them."""

    class Layer(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.ModuleList(nn.Linear(2, 2) for _ in range(9)))

    layers = nn.ModuleList(Layer() for _ in range(3))
    model = nn.ModuleDict({"layers": layers, "shorter": nn.ModuleList([nn.Linear(2, 2)])})
    assert blocks(model) == list(layers)
    mixed = nn.ModuleList([Layer(), nn.Linear(2, 2)])
    assert blocks(nn.ModuleDict({"layers": mixed})) is None


def test_layers_that_are_lists_are_recomputed_part_by_part(make_student: Callable[[], Any]) -> None:
    """As x-transformers and others keep them: norm, attention, MLP and a dropout that may be None."""

    def made(recomputed: bool) -> Any:
        student = make_student()
        parts = [nn.ModuleList([nn.LayerNorm(block.linear.in_features), block, None]) for block in student.blocks]
        student.listed = nn.ModuleList([*parts, None])
        del student.blocks
        student.blocks = [part[1] for part in parts]
        if recomputed:
            assert checkpoint_blocks(student) == 3
        return student

    expected, found = gradients(plain := made(False)), gradients(recomputed := made(True))
    pairs = zip(expected, found, strict=True)
    assert all(theirs is None is ours or torch.equal(theirs, ours) for theirs, ours in pairs)
    assert [[block.runs for block in student.blocks] for student in (plain, recomputed)] == [[1] * 3, [2] * 3]


@pytest.mark.parametrize(("every_k", "runs"), [(1, [2, 2, 2]), (2, [2, 1, 2]), (3, [2, 1, 1]), (9, [2, 1, 1])])
def test_every_kth_block(every_k: int, runs: list[int], make_student: Callable[[], Any]) -> None:
    plain, checkpointed = make_student(), make_student()
    assert checkpoint_blocks(checkpointed, every_k) == runs.count(2)
    expected, found = gradients(plain), gradients(checkpointed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert [block.runs for block in checkpointed.blocks] == runs


def test_no_kth_block(make_student: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        checkpoint_blocks(make_student(), 0)
