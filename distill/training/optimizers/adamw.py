"""AdamW in all its memory sizes: by the type of its moments, and by how a bfloat16 weight keeps a small step."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import nn

from distill.errors import UserError, did_you_mean
from distill.training.optimizers.chunked_adamw import ChunkedAdamW
from distill.training.optimizers.moments import need_torchao
from distill.training.optimizers.rounding import Rounding

MOMENT_BITS = {"adamw": None, "adamw_8bit": 8, "adamw_4bit": 4, "paged_adamw_8bit": 8}
"""Bits of a value of AdamW's moments, by the optimiser's name. None means the weights' type."""

NO_DECAY = "_no_weight_decay"
"""Attribute of a parameter that is not to decay, as Mamba's own code and its followers set it."""


def make_optimizer(
    module: nn.Module,
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    rounding: Rounding | Literal["auto"] = "nearest",
    device_type: str | None = None,
    is_scaled: bool = False,
) -> torch.optim.Optimizer:
    """Make AdamW over the trainable parameters of `module`, on their device (a forecast takes it to be `device_type`).

    Matrices decay; vectors (norms, biases) and parameters marked `_no_weight_decay` do not. `adamw` has moments in the
    weights' type. `adamw_8bit` and `adamw_4bit` have moments of so many bits, with one scale for a group of values, and
    `paged_adamw_8bit` has them in memory that a CUDA driver moves to the host. With mixed precision the weights are
    float32 (the master weights), and rounding does not matter. bfloat16 weights lose updates smaller than half their
    last digit, 0.2 to 0.4 percent, unless these are rounded at random (`stochastic`, from torch's global generator) or
    kept beside the weight (`kahan`, two bytes a weight).

    `adamw` updates all weights in one kernel on a CPU and on CUDA. Not so where gradients are scaled (`is_scaled`, by
    the scaler of float16): that kernel would undo the scale by itself, after callbacks have looked at the gradients.

    All state is tensors and numbers, so a checkpoint is read with `torch.load(weights_only=True)` and resumes bitwise.
    Raises UserError for combinations that do not exist and for libraries that are not there.
    """
    groups = _groups(module, weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise UserError("the student has no parameter to train")
    device_type = device_type or parameters[0].device.type
    precision = "bf16-true" if any(p.dtype == torch.bfloat16 for p in parameters) else "32-true"
    rounding = choose_rounding(rounding, name, precision)
    check_optimizer(name, rounding=rounding, precision=precision, device_type=device_type)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas}
    if name == "paged_adamw_8bit":
        from distill.training.optimizers.paged import PagedAdamW8bit

        return PagedAdamW8bit(groups, **settings)
    if name == "adamw_8bit" and rounding == "nearest" and device_type == "cuda":
        from distill.training.optimizers.fused import FusedAdamW8bit

        return FusedAdamW8bit(groups, **settings)
    if name == "adamw" and rounding == "nearest":
        return torch.optim.AdamW(groups, **settings, fused=device_type in ("cpu", "cuda") and not is_scaled)
    return ChunkedAdamW(groups, **settings, rounding=rounding, moment_bits=MOMENT_BITS[name])


def choose_rounding(rounding: str, name: str, precision: str) -> Rounding:
    """Return the rounding that `auto` means: one that loses no small step, where weights are bfloat16 and AdamW has it.

    A paged optimiser rounds to the nearest, and so does everything that has float32 weights.
    """
    if rounding == "auto":
        return "stochastic" if precision == "bf16-true" and name != "paged_adamw_8bit" else "nearest"
    return cast("Rounding", rounding)


def check_optimizer(name: str, *, rounding: str, precision: str, device_type: str, strategy: str = "auto") -> None:
    """Raise UserError for an optimiser that does not exist here, before anything has been built."""
    if name not in MOMENT_BITS:
        raise UserError(f"train.optimizer: {name}: no such optimiser{did_you_mean(name, MOMENT_BITS)}")
    if rounding != "nearest" and precision != "bf16-true":
        raise UserError(
            f"train.rounding: {rounding} is for bfloat16 weights: add --train.precision bf16-true, "
            "or leave it at auto (mixed precision has float32 weights, which round nothing off)"
        )
    if MOMENT_BITS[name] is not None and strategy == "fsdp":
        raise UserError(f"train.optimizer: {name} cannot be shared out over devices: use adamw with fsdp")
    if name == "paged_adamw_8bit":
        if rounding != "nearest":
            raise UserError(f"train.rounding: {rounding} does not go with paged_adamw_8bit; it does with adamw_8bit")
        if device_type != "cuda":
            raise UserError(
                f"train.optimizer: paged_adamw_8bit needs a CUDA device, this is {device_type}: use adamw_8bit"
            )
    if name == "adamw_4bit":
        need_torchao()


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decay, keep = ([p for p in parameters if _decays(p) is wanted] for wanted in (True, False))
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def marked(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that are marked not to decay."""
    return frozenset(name for name, parameter in module.named_parameters() if getattr(parameter, NO_DECAY, False))


def mark(module: nn.Module, names: frozenset[str]) -> None:
    """Mark the parameters of these names. One that was sharded or moved is another object, without its marks."""
    for name, parameter in module.named_parameters():
        if name in names:
            setattr(parameter, NO_DECAY, True)


def _decays(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is a matrix, without the mark by which state-space models except some of theirs."""
    return parameter.ndim >= 2 and not getattr(parameter, NO_DECAY, False)
