"""One optimiser step of a student under Lightning: count, passes, sum over devices, guard, clip, update.

Shapes: B batch, L sequence length, N positions with loss, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from distill.cache.reading.batches import Batch
from distill.errors import UserError
from distill.losses.chunks import ChunkTarget, DenseChunk
from distill.losses.features import feature_distance
from distill.losses.fused import Walk, fused_loss
from distill.losses.objective import Mixture
from distill.models.language_model import Head, hidden_states, run_body, split_output
from distill.system.memory import free_memory, is_out_of_memory
from distill.system.progress import say
from distill.system.seeds import seed_all
from distill.training.chunk_target import chunk_target
from distill.training.guards import NonFinite, too_large
from distill.training.optimizers.adamw import mark, marked
from distill.training.optimizers.schedule import Schedule
from distill.training.optimizers.step_in_backward import StepInBackward, gradient_norm, whole
from distill.training.parallel import is_sharded, shard, sum_gradients


class DistillationModule(pl.LightningModule):
    """The training of `student` (body and head) on batches of a cache, each with the samples of one optimiser step.

    The loss of a step is the sum over its positions, on all devices, divided by their number. The number is counted
    before the first pass, so every pass is scaled rightly at once, and a step can start again. After an out-of-memory
    error it does, in passes of half the size, with the same result (apart from dropout, which is drawn pass by pass).
    All random draws of a step are a function of seed, step and device, so a resumed training draws the same as an
    undisturbed one.

    Args:
        student: an nn.Module with `body` and `head`.
        vocab_size: real tokens of the tokenizer.
        objective: the loss to minimise, for example `Mixture(alpha=0)`.
        chunk_size: positions whose logits exist at one time.
        micro_batch: samples a forward pass.
        make_optimizer: module with the trained parameters -> optimiser.
        make_schedule: number of optimiser steps -> learning rate schedule.
        gradient_clip: largest gradient norm; 0 turns clipping off.
        non_finite: policy for a loss or gradient that is not finite.
        seed: seed of the random draws of a step.
        teacher_head: the teacher's head, for a cache of hidden states.
        schedule_teacher: the teacher's weight follows the learning rate.
        feature: distance of the final hidden states, `feature_weight` its weight, for a cache of hidden states.
        saved_activations: context in which the body runs, which may keep activations elsewhere.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        vocab_size: int,
        objective: Mixture,
        chunk_size: int,
        micro_batch: int,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        make_schedule: Callable[[int], Schedule],
        gradient_clip: float = 0.0,
        non_finite: NonFinite | None = None,
        seed: int = 0,
        teacher_head: Head | None = None,
        schedule_teacher: bool = False,
        feature: Literal["cosine", "mse"] = "cosine",
        feature_weight: float = 0.0,
        saved_activations: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen parameters are not in a checkpoint; `on_load_checkpoint` is strict
        self.student: Any = student
        self.undecayed = marked(student)
        self.vocab_size, self.objective, self.chunk_size = vocab_size, objective, chunk_size
        self.micro_batch = micro_batch
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule
        self.gradient_clip, self.non_finite, self.seed = gradient_clip, non_finite or NonFinite("stop"), seed
        self.teacher_head = teacher_head
        self.schedule_teacher, self.saved_activations = schedule_teacher, saved_activations
        self.feature, self.feature_weight = feature, feature_weight
        self.projection = _projection(student, teacher_head) if feature_weight else None
        self.loss_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Context in which head and loss run. A forecast marks their tensors in it."""
        self.loss_walk = Walk()
        """Way through the logits of a block. A forecast leaves out parts of it."""
        self.steps_begun = 0
        """Steps that were begun, including those left out."""
        self.last_loss: float | None = None
        """Loss of the last step that was not left out."""

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leave the batch on the host, because only the micro-batch of a pass needs to be on the device."""
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make one optimiser step: count positions, run the passes, sum over devices, guard, clip, update."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16: scales loss and gradients up
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.steps_begun += 1

        # Count. The loss is a mean over the positions of all passes on all devices. Their number is known before the
        # first pass, so each pass is divided by it, and nothing is corrected later.
        positions, samples = self._counted(batch)
        tokens = samples * batch.input_ids_BL.shape[1]

        # Passes: forward and backward of a micro-batch each. The gradients add up in place.
        while positions:
            try:
                self._seed(1 + self.global_rank)  # dropout differs between devices
                losses = torch.zeros(2, device=self.device)
                for micro_batch in self._micro_batches(batch):
                    losses += self._pass(micro_batch, positions, tokens)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Weights moved during backward, or other devices wait for this one in a collective: no second try.
                if self.micro_batch == 1 or isinstance(optimizer.optimizer, StepInBackward) or is_sharded(self):
                    raise too_large(self.micro_batch) from None
            # Out of memory: all passes again, of half the size. (The error holds tensors until `except` is left.)
            optimizer.zero_grad()
            self._halve_micro_batch()

        if positions:
            # Sum over devices: once a step, after the passes of all devices have succeeded.
            sum_gradients(self)
            scaled_norm = gradient_norm(self, optimizer.optimizer)
            # Guard. Here alone the host waits for the device: a step that is not finite must not reach the weights.
            # Under float16 the scaler looks at the gradients itself.
            loss, auxiliary, norm = torch.stack([*self._summed(losses), whole(scaled_norm) / scale]).tolist()
            if self.non_finite.step_is_fine(loss, None if scaler else norm, self.student, self.steps_begun):
                self.last_loss = loss
                self._log_step(loss, auxiliary, norm)
                if self.gradient_clip:
                    torch.nn.utils.clip_grads_with_norm_(self.parameters(), self.gradient_clip * scale, scaled_norm)
                self._seed(0)  # stochastic rounding is the same on all devices
                optimizer.step()
                if scaler is not None:  # after an overflow the scaler left the step out, and lowered its scale
                    self.non_finite.overflowed(scaler.get_scale() < scale, self.steps_begun)
            optimizer.zero_grad()
        scheduler.step()

    def _pass(self, micro_batch: Batch, positions: float, tokens: float) -> Tensor:
        """Run forward and backward; return the pass's share of the step's loss, and of that the auxiliary loss.

        `micro_batch` is on the host.
        """
        loss, auxiliary = self._losses(micro_batch, self._objective())
        auxiliary = auxiliary / tokens
        loss = loss / positions + auxiliary
        fsdp_divisor = self.trainer.world_size if is_sharded(self) else 1  # fsdp takes the mean; we want the sum
        with torch.autocast(self.device.type, enabled=False):  # Lightning has turned it on for the whole step
            self.manual_backward(loss * fsdp_divisor)
        return torch.stack([loss.detach(), auxiliary.detach()])

    def _seed(self, purpose: int) -> None:
        """Make all random draws from here on a function of seed, step and purpose."""
        seed_all((self.seed * 1_000_003 + self.steps_begun) * 4_099 + purpose)

    def _objective(self) -> Mixture:
        """Return the objective at this step."""
        if not self.schedule_teacher:
            return self.objective
        scheduler: Any = self.lr_schedulers()
        return self.objective.with_teacher_weight(scheduler.lr_lambdas[0](scheduler.last_epoch))

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Yield `micro_batch` samples at a time. Samples without any position with loss take no part."""
        counts_B = batch.loss_mask_BL.any(1)
        tensors = ("input_ids_BL", "position_ids_BL", "loss_mask_BL")  # those without such samples' rows: no target
        counted = batch if counts_B.all() else replace(batch, **{key: getattr(batch, key)[counts_B] for key in tensors})
        starts = range(0, len(counted.input_ids_BL), self.micro_batch)
        most = len(starts)
        if is_sharded(self):
            # Each pass gathers weights in a collective, so all devices make equally many, some of them of nothing.
            # Their number is a collective too, so it comes before the first pass.
            most = int(self.trainer.strategy.reduce(torch.tensor(most, device=self.device), reduce_op="max"))
        yield from (counted.rows(start, start + self.micro_batch) for start in starts)
        yield from [batch.rows(0, 1).without_loss()] * (most - len(starts))

    def _halve_micro_batch(self) -> None:
        """Free memory, and make passes of half the size from here on."""
        free_memory()
        self.micro_batch = -(-self.micro_batch // 2)
        where = f" on device {self.global_rank}" if self.trainer.world_size > 1 else ""
        what = f"out of memory{where}; from here on {self.micro_batch} samples a forward pass"
        say(f"step {self.steps_begun}: {what}", by_any=True)

    def _losses(self, on_host: Batch, objective: Mixture) -> tuple[Tensor, Tensor]:
        """Return the sum of the loss over the batch's positions, and the student's auxiliary loss (0 without one)."""
        # Sizes that follow from values, such as the number of positions, are found on the host: it would wait for the
        # device to tell them.
        target = self._target(on_host)
        positions_N = on_host.loss_mask_BL.flatten().nonzero().squeeze(1).to(self.device, non_blocking=True)
        inputs = (on_host.input_ids_BL, on_host.position_ids_BL)
        ids_BL, positions_BL = (tensor.to(self.device, non_blocking=True) for tensor in inputs)
        with self.saved_activations(self.student):
            output = run_body(self.student, ids_BL, positions_BL)
        hidden_BLD, auxiliary = split_output(output)
        hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, positions_N)
        head = self.student.head.with_rows(self.vocab_size)
        with self.loss_context():
            loss = fused_loss(hidden_ND, head, target, objective, self.chunk_size, self.loss_walk)
        if self.projection is not None and torch.is_grad_enabled():
            assert isinstance(target, DenseChunk)
            distance_N = feature_distance(
                self.projection(hidden_ND.to(self.projection.weight.dtype)), target.hidden_ND, self.feature
            )
            loss = loss + self.feature_weight * distance_N.sum()
        if auxiliary is None:
            return loss, torch.zeros_like(loss)
        # A pass without loss only joins the other devices' collectives; its sample counts nothing.
        return loss, auxiliary.to(loss.dtype) * bool(on_host.loss_mask_BL.any())

    def _target(self, on_host: Batch) -> ChunkTarget:
        """Return the targets of a batch on the host, on the device."""
        if self.teacher_head is not None:
            self.teacher_head = self.teacher_head.to(self.device)
        return chunk_target(on_host, self.device, self.teacher_head, self.objective.temperature)

    def _counted(self, batch: Batch) -> tuple[float, float]:
        """Return the positions with loss, and the samples that have any, of all devices."""
        counts = torch.stack([batch.loss_mask_BL.sum(), batch.loss_mask_BL.any(1).sum()])
        positions, samples = (counts if self.trainer.world_size == 1 else self._summed(counts.float())).tolist()
        return float(positions), float(samples)

    def _summed(self, sums: Tensor) -> Tensor:
        """Return the sum over all devices."""
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")

    def _log_step(self, loss: float, auxiliary: float, norm: float) -> None:
        """Log the step now. Lightning's own way is after all callbacks, and so after the step's checkpoint.

        A training that was stopped or killed between the two would go on behind the step, and its curve lack it.
        """
        scheduler: Any = self.lr_schedulers()
        trainer: Any = self.trainer
        values: dict[str, Any] = {"loss": loss, "learning_rate": scheduler.get_last_lr()[0], "gradient_norm": norm}
        if auxiliary:
            values["auxiliary_loss"] = auxiliary
        for name, value in values.items():
            self.log(name, value, prog_bar=name == "loss", logger=False)
        if self.steps_begun % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": self.current_epoch, **values}, step=self.steps_begun - 1)
                logger.save()

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return means over all positions, in nats: `held_out_kl` (forward KL), `held_out_loss` (the objective), and
        the text's nll, the student's and (at the cache's temperature) its teacher's. Nothing without positions."""
        divergences = Mixture(0, self.objective.temperature), self.objective, Mixture(1)
        sums = torch.zeros(5)
        was_training = self.student.training
        self.student.eval()
        with self.trainer.precision_plugin.val_step_context():
            for on_host in (micro_batch for batch in batches for micro_batch in self._micro_batches(batch)):
                micro_batch = on_host.to(self.device)
                hidden_BLD = hidden_states(self.student, micro_batch.input_ids_BL, micro_batch.position_ids_BL)
                hidden_ND, target = hidden_BLD[micro_batch.loss_mask_BL], self._target(on_host)
                head = self.student.head.with_rows(self.vocab_size)
                losses = [fused_loss(hidden_ND, head, target, one, self.chunk_size).float() for one in divergences]
                counts = on_host.surprisal_N.sum(), on_host.loss_mask_BL.sum().float()
                sums += torch.stack([*(loss.cpu() for loss in losses), *counts])
        self.student.train(was_training)
        *totals, positions = self._summed(sums).tolist()
        names = "held_out_kl", "held_out_loss", "held_out_nll", "teacher_nll"
        return {name: total / positions for name, total in zip(names, totals, strict=True)} if positions else {}

    def configure_model(self) -> None:
        """Shard the weights if the strategy asks for it (fsdp). Lightning calls this before each use."""
        if self.device_mesh is not None and not is_sharded(self):
            shard(self.student, self.device_mesh["data_parallel"])
            if self.projection is not None:
                shard(self.projection, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        mark(self.student, self.undecayed)
        optimizer = self.make_optimizer(self)
        schedule = self.make_schedule(int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained weights in the checkpoint; frozen ones come from their own files."""
        for name in self._frozen():
            checkpoint["state_dict"].pop(name, None)
        checkpoint["steps"] = {
            "begun": self.steps_begun,
            "skipped": self.non_finite.skipped,
            "in_a_row": self.non_finite.in_a_row,
            "micro_batch": self.micro_batch,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters. Raises UserError if the checkpoint is of another student."""
        here = self.state_dict().keys() - self._frozen()
        there = checkpoint["state_dict"].keys()
        if here != there:
            odd = sorted(here ^ there)
            raise UserError(f"the checkpoint is of another student ({len(odd)} weights differ, such as {odd[0]})")
        steps = checkpoint["steps"]
        self.steps_begun, self.micro_batch = steps["begun"], min(self.micro_batch, steps["micro_batch"])
        self.non_finite.skipped, self.non_finite.in_a_row = steps["skipped"], steps["in_a_row"]

    def _frozen(self) -> set[str]:
        """Return the names that a checkpoint lacks: frozen parameters, and what quantisation keeps beside them."""
        names = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {key for key in self.state_dict() if any(key == name or key.startswith(name + ".") for name in names)}


def _projection(student: Any, teacher_head: Head | None) -> nn.Linear:
    """Make the map from the student's hidden states to the teacher's size, for features. It is not saved."""
    assert teacher_head is not None, "features are learned from a cache of hidden states"
    sizes = student.head.weight_VD.shape[1], teacher_head.weight_VD.shape[1]
    return nn.Linear(*sizes, bias=False)
