"""The optimiser's step inside the backward pass, so that never more than a few gradients exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.errors import UserError


class StepInBackward(torch.optim.Optimizer):
    """An optimiser that updates each parameter as soon as its gradient is complete, and frees the gradient.

    The backward pass makes the step; one pass a step. `step()` only ends it, so that the next one is possible. Groups,
    learning rates and state are those of the `optimizer` inside, so its checkpoints are interchangeable with those of a
    plain training. The results are those of `optimizer` to the last bit, apart from its random draws: parameters come
    in another order.

    A shared parameter is updated once: autograd sums up its gradients before it stores them, and no backward step that
    still needs a parameter comes after that.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        """Register hooks at the parameters of `optimizer`; `module` knows their names."""
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._share()
        self._norms: dict[Tensor, Tensor] = {}
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        assert parameter not in self._norms, "step() comes after every backward pass"
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        if not norm.isfinite():
            raise UserError(
                f"the gradient of {self._names.get(parameter, 'a weight')} is not finite, and others have been used "
                "already: go on from the last checkpoint with `--resume --train.step_in_backward false "
                "--train.non_finite skip`, or train anew with a lower --train.learning_rate"
            )
        self._norms[parameter] = norm
        self.optimizer.step()  # this parameter is the only one with a gradient
        parameter.grad = None

    def step(self, closure: Any = None) -> Any:
        """End the step that the backward pass has made."""
        loss = None if closure is None else closure()
        self._norms.clear()
        return loss

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients of the backward pass, until `step()` ends it."""
        norms = list(self._norms.values()) or [torch.zeros(())]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimiser inside."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state into the optimiser inside."""
        self.optimizer.load_state_dict(state_dict)
        self._share()


def gradient_norm(module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm of all gradients of a step, also where backward has used and freed them."""
    if isinstance(optimizer, StepInBackward):
        return optimizer.gradient_norm()
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def whole(norm: Tensor) -> Tensor:
    """Return a norm as a plain tensor. Of gradients that devices share, each holds a part: that is a collective."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def check_step_in_backward(
    *,
    accumulate_grad_batches: int,
    gradient_clip: float,
    devices: int,
    num_nodes: int,
    strategy: str,
    precision: str,
    non_finite: str,
) -> None:
    """Raise UserError if something else needs the gradients of all parameters at one time."""
    conflicts = [
        (accumulate_grad_batches != 1, "train.accumulate_grad_batches 1, for no gradient is left to add to"),
        (gradient_clip != 0, "train.gradient_clip 0, for the norm is known only when all weights have moved"),
        (devices * num_nodes != 1, "train.devices 1 and train.num_nodes 1, for gradients are added up after backward"),
        (strategy == "fsdp", "train.strategy auto, for fsdp stores gradients in its own way"),
        (precision == "16-mixed", "train.precision bf16-mixed, for float16's gradients are unscaled after backward"),
        (non_finite != "stop", "train.non_finite stop, for a part of the step cannot be left out"),
    ]
    for conflict, needed in conflicts:
        if conflict:
            raise UserError(f"train.step_in_backward: needs {needed}")
