"""bitsandbytes' fused 8-bit AdamW for CUDA, with the checkpoints of our own implementation."""

from __future__ import annotations

from itertools import chain
from typing import Any

import bitsandbytes
import torch
from torch import Tensor


class FusedAdamW8bit(bitsandbytes.optim.AdamW8bit):
    """AdamW with moments in 8 bits, whose step is one kernel a parameter.

    Its codes and groups of 256 values are those of `ChunkedAdamW(moment_bits=8)`, which CPUs and other ways of rounding
    use. So is its state in a checkpoint: a training that began on one device resumes on the other.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form of `ChunkedAdamW`."""
        content = torch.optim.Optimizer.state_dict(self)
        return {**content, "state": {number: _chunked(state) for number, state in content["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state in the form of `ChunkedAdamW`."""
        # torch would cast codes and scales to the weights' type, so it loads the groups alone.
        torch.optim.Optimizer.load_state_dict(self, {**state_dict, "state": {}})
        self.fill_qmap()
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = self._fused(state_dict["state"][number], parameter)

    def _fused(self, state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        made = {"step": state["step"]}
        for number, (name, qmap) in enumerate({"exp_avg": "dynamic", "exp_avg_sq": "udynamic"}.items(), start=1):
            moment = state[name]
            if isinstance(moment, Tensor):  # small parameters keep theirs in full
                made[f"state{number}"] = moment.to(parameter.device, torch.float32, copy=True).view_as(parameter)
                continue
            self.name2qmap[qmap] = self.name2qmap[qmap].to(parameter.device)
            made[f"state{number}"] = moment["codes"].to(parameter.device, copy=True).view_as(parameter)
            made[f"absmax{number}"] = moment["scale"].to(parameter.device, copy=True)
            made[f"qmap{number}"] = self.name2qmap[qmap]
        return made


def _chunked(state: dict[str, Any]) -> dict[str, Any]:
    made = {"step": state["step"]}
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        values = state[f"state{number}"]
        is_coded = values.dtype == torch.uint8
        made[name] = {"codes": values.view(-1), "scale": state[f"absmax{number}"]} if is_coded else values
    return made
