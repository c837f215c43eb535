"""Lack of memory costs nothing but time, and what is not finite never reaches the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cache.format.records import Record
from distill.errors import UserError
from distill.training.guards import IN_A_ROW, NonFinite

Run = Callable[..., dict[str, Tensor]]
Harm = Callable[[int, Tensor, Tensor], Tensor]


def harmed(harm: Harm) -> Callable[[Any], Any]:
    """Changes a student so that the hidden states of each call go through `harm(call, ids, hidden)`; calls from 1."""

    def change(student: Any) -> Any:
        body, calls = student.body, iter(range(1, 10**6))
        student.body = lambda ids_BL, positions_BL: harm(next(calls), ids_BL, body(ids_BL, positions_BL))
        return student

    return change


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0)


@pytest.fixture
def ten_steps(records: list[Record]) -> dict[str, Any]:
    """Four samples a step, all with positions that carry loss."""
    some = [records[index] for index in (0, 2, 4, 5, 7, 9, 0, 4)]
    return {"samples": some * 5, "trainer": {"max_steps": 10}}


def needs_room_for(samples: int, from_call: int, in_backward: bool) -> Harm:
    """A card that from some call on has no room for so many samples."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor) -> Tensor:
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no room for the gradients")

    def harm(call: int, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        if call < from_call or len(ids_BL) <= samples or not torch.is_grad_enabled():
            return hidden_BLD
        if in_backward:
            return Backward.apply(hidden_BLD)
        raise torch.OutOfMemoryError("no room for the activations")

    return harm


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("micro_batch", "accumulate", "room", "call"), [(4, 1, 2, 3), (4, 1, 1, 3), (2, 2, 1, 6)])
def test_out_of_memory_at_step_3_is_the_same_training_in_smaller_passes(
    run: Run,
    ten_steps: dict[str, Any],
    adamw: Any,
    capsys: pytest.CaptureFixture[str],
    in_backward: bool,
    micro_batch: int,
    accumulate: int,
    room: int,
    call: int,
) -> None:
    """Call 6 is the second pass of the third step: the first one's gradients must not count twice."""
    expected = run(micro_batch, accumulate, make_optimizer=adamw, **ten_steps)
    change = harmed(needs_room_for(room, call, in_backward))
    found = run(micro_batch, accumulate, make_optimizer=adamw, change=change, **ten_steps)
    check_same(found, expected, tolerance=1e-6)
    assert f"step 3: out of memory; from here on {room} sample" in capsys.readouterr().out


def test_no_room_for_one_sample_ends_with_advice(run: Run, ten_steps: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"out of memory with 1 sample .*activation_checkpointing"):
        run(4, 1, change=harmed(needs_room_for(0, 3, False)), **ten_steps)


def test_other_errors_are_not_taken_for_lack_of_memory(run: Run, ten_steps: dict[str, Any]) -> None:
    def harm(call: int, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(4, 1, change=harmed(harm), **ten_steps)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], torch.nan)


def not_finite_at(call_of_harm: int, what: str) -> Harm:
    def harm(call: int, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        if call != call_of_harm:
            return hidden_BLD
        return hidden_BLD * torch.nan if what == "loss" else NanGradient.apply(hidden_BLD)

    return harm


WHAT = {"loss": "the loss is nan", "gradient": r"the gradient of embedding.weight is not finite"}


@pytest.mark.parametrize("what", WHAT)
def test_not_finite_at_step_5_stops_with_the_weights_of_step_4(
    run: Run, make_student: Any, ten_steps: dict[str, Any], what: str
) -> None:
    kept: list[Any] = []

    def change(student: Any) -> Any:
        kept.append(student)
        return harmed(not_finite_at(5, what))(student)

    with pytest.raises(UserError, match=rf"step 5: {WHAT[what]}.*--train.non_finite skip.*--train.learning_rate"):
        run(4, 1, change=change, **ten_steps)
    expected = run(4, 1, samples=ten_steps["samples"], trainer={"max_steps": 4})
    del expected["loss"]
    check_same(dict(kept[0].state_dict()), expected)


@pytest.mark.parametrize("what", WHAT)
def test_not_finite_at_step_5_is_left_out_if_asked(
    run: Run, ten_steps: dict[str, Any], adamw: Any, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """The training on all the other steps; momentum and decay do not move the weights in between either."""
    guard = NonFinite("skip")
    samples = ten_steps["samples"]
    harm = {"change": harmed(not_finite_at(5, what)), "make_optimizer": adamw, "non_finite": guard}
    found = run(4, 1, samples=samples[:28], trainer={"max_epochs": 1}, **harm)
    expected = run(4, 1, samples=samples[:16] + samples[20:28], trainer={"max_epochs": 1}, make_optimizer=adamw)
    check_same(found, expected)
    assert guard.skipped == 1
    out = capsys.readouterr().out
    assert "step 5" in out and "left out (1 so far)" in out


def test_nothing_but_steps_left_out_ends_the_training(run: Run, ten_steps: dict[str, Any]) -> None:
    def harm(call: int, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        return hidden_BLD * torch.nan

    with pytest.raises(UserError, match=f"the {IN_A_ROW}th step in a row"):
        run(4, 1, change=harmed(harm), non_finite=NonFinite("skip"), samples=ten_steps["samples"] * 3)


def test_a_float16_that_never_fits_ends_the_training() -> None:
    guard = NonFinite("stop")
    for step in range(1, 10):
        guard.overflowed(step % 2 == 0, step)
    assert (guard.skipped, guard.in_a_row) == (4, 0)
    for step in range(1, IN_A_ROW):
        guard.overflowed(True, step)
    with pytest.raises(UserError, match=r"beyond float16.*bf16-mixed"):
        guard.overflowed(True, IN_A_ROW)
