"""Several devices: whole copies whose gradients are summed (ddp), or a share of the student on each (fsdp)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from distill.errors import UserError
from distill.training.activation_checkpointing import blocks

BUCKET_BYTES = 32 * 2**20


class SummedGradients(DDPStrategy):
    """Lightning's ddp without torch's wrapper. `sum_gradients` adds the gradients up once a step.

    That is after all passes of all devices have succeeded, so a device that ran out of memory can begin its step anew.
    """

    def configure_ddp(self) -> None:
        """Give every device the weights of the first."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):  # type: ignore[union-attr]
            dist.broadcast(tensor.data, src=0)


def sum_gradients(module: nn.Module) -> None:
    """Sum the gradients of all devices, in buckets.

    If one device has no gradient and another has one, the missing one is zero. A weight that no device used has none.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or is_sharded(module):
        return
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Devices may use different weights (a mixture's experts). The collectives below must be the same on all of them.
    used = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device).int()
    dist.all_reduce(used, dist.ReduceOp.MAX)  # 1 where any device used the weight
    bucket: list[Tensor] = []
    for parameter in (parameter for parameter, is_used in zip(trained, used.tolist(), strict=True) if is_used):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.dtype or _bytes(bucket) >= BUCKET_BYTES):
            _sum(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum(bucket)


def _sum(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)  # a sum: each pass was divided by the positions of all devices
    for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class SharedWeights(ModelParallelStrategy):
    """Lightning's fsdp. The weights of a checkpoint are loaded here already, and only their names are handed on."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values only, whatever the caller says."""
        names = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return {**super().load_checkpoint(checkpoint_path, weights_only=True), "state_dict": dict.fromkeys(names)}


def is_sharded(module: nn.Module) -> bool:
    """Tell whether each device holds a share of the weights (fsdp), also while they are gathered."""
    return any(isinstance(inner, FSDPModule) for inner in module.modules())


def shard(module: nn.Module, mesh: Any) -> None:
    """Give each device a share of every block's weights, and of all others together (torch's fully_shard).

    The others, embedding and head among them, are whole from the body to the end of the backward pass: the head is
    used outside of any module's forward.
    """
    for block in blocks(module) or []:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    if hasattr(module, "body"):
        register_fsdp_forward_method(module, "body")


def make_strategy(name: str, devices: int) -> Any:
    """Return Lightning's strategy `auto`, `ddp` or `fsdp`. Raises UserError for fsdp on one device."""
    if name == "fsdp":
        if devices == 1:
            raise UserError("train.strategy: fsdp shares the student out over devices: give --train.devices, or auto")
        return SharedWeights(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return SummedGradients() if devices > 1 else "auto"
