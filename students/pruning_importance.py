"""Importance of each layer, neuron, head, channel and expert of a teacher on samples, in one pass over its weights.

Shapes: B samples, L sequence length, N counted positions of a sample, I layers, D hidden size, F neurons,
G key-value groups, E experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distill.models.language_model import Head
from students.pruning_families import FAMILIES, Family
from students.pruning_stream import LayerCall, LayerwiseTeacher
from students.pruning_width import Widths

STATE_BYTES = 2**31  # of hidden states at a time; more samples mean another pass over the weights
CHUNK = 256  # positions whose logits exist at once


@dataclass(frozen=True)
class Samples:
    """Rows of the corpus, to measure importance on."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    counted_BL: Tensor
    """Mask (bool) of the positions that count. Padding does not."""


@dataclass(frozen=True)
class Wanted:
    """Importances to measure."""

    depth: bool = False
    hidden: bool = False
    groups: bool = False
    neurons: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Importance:
    """Importances, float64 on the CPU. None means not wanted.

    Width is scored by activations, as Minitron found best (Muralidharan et al. 2024, "Compact Language Models via
    Pruning and Knowledge Distillation", §2.2). The score at each position is the absolute value of the MLP's inner
    activation (neurons), the norm of each head's output, summed over the heads of a group (groups), or the absolute
    output of a norm (channels), or 1 where a token chooses the expert. It is averaged over a sample's positions, then
    the L2 norm is taken over samples. Layers that have no such units score 0.
    """

    depth_I: Tensor | None = None
    """KL(teacher ‖ teacher without this layer), nats, mean over the counted positions of all samples: how Minitron
    (§2.2) and ShortGPT (Men et al. 2024) rank layers by loss, with the loss that the student will be trained on.
    """
    hidden_ID: Tensor | None = None
    """Sum over the layer's norms. The last row is the norm after all layers, so there are I + 1 rows."""
    groups_IG: Tensor | None = None
    neurons_IF: Tensor | None = None
    experts_IE: Tensor | None = None


@torch.no_grad()
def measure(teacher: LayerwiseTeacher, samples: Samples, wanted: Wanted) -> Importance:
    """Measure the wanted importances.

    Memory holds one layer of the teacher (or its embedding, or its head), and the samples' hidden states: one each, and
    for depth one more for each layer. Samples take turns so that these stay within `STATE_BYTES`; each turn reads all
    layers.
    """
    rows = [row for row in range(samples.input_ids_BL.shape[0]) if bool(samples.counted_BL[row].any())]
    if not rows:
        raise ValueError("the samples have no position that counts")
    states = len(teacher) + 1 if wanted.depth else 1
    size = 4 * samples.input_ids_BL.shape[1] * Widths.of(teacher.model.config).hidden * states
    turn = max(1, STATE_BYTES // size)
    measurement = _Measurement(teacher, samples, wanted)
    for start in range(0, len(rows), turn):
        measurement.take(rows[start : start + turn])
    return measurement.result()


class _Measurement:
    """Sums over samples, as they come through the layers."""

    def __init__(self, teacher: LayerwiseTeacher, samples: Samples, wanted: Wanted) -> None:
        self.teacher, self.samples, self.wanted = teacher, samples, wanted
        self.widths = Widths.of(teacher.model.config)
        self.family = FAMILIES[teacher.model.config.model_type]
        self.squares: dict[tuple[str, int], Tensor] = {}  # (activation's name, layer) → squared means over positions
        self.kl_I = torch.zeros(len(teacher), dtype=torch.float64)
        self.positions = 0

    def take(self, rows: list[int]) -> None:
        """Take samples through all layers, each layer read once.

        A sample's states are those of the whole teacher and, for depth, of the teacher without layer 0, 1, …; the state
        without layer i begins as the input of layer i.
        """
        states: dict[int, list[Tensor]] = {}
        calls: dict[int, list[LayerCall]] = {}
        begun = self.teacher.begin(self.samples.input_ids_BL[rows], self.samples.position_ids_BL[rows])
        for row, (entering_LD, its_calls) in zip(rows, begun, strict=True):
            states[row], calls[row] = [entering_LD.cpu()], its_calls
        del begun
        for index in _shown(range(len(self.teacher))):
            with self.teacher.layer(index) as layer:
                for row in rows:
                    states[row] = self._through(layer, index, row, calls[row][index], states[row])
        for row in rows:
            self.positions += int(self.samples.counted_BL[row].sum())
            if self.wanted.hidden:
                final_LD = self.teacher.norm(states[row][0].to(self.teacher.device))
                self._add("norm", len(self.teacher), row, final_LD)
        if self.wanted.depth:
            with self.teacher.head() as head:
                for row in rows:
                    counted_L = self.samples.counted_BL[row]
                    self.kl_I += self._kl(head, [state_LD[counted_L] for state_LD in states.pop(row)])

    def _through(self, layer: nn.Module, index: int, row: int, call: LayerCall, states: list[Tensor]) -> list[Tensor]:
        """Return a sample's states after a layer."""
        device = self.teacher.device
        entering_LD, *without = states
        with _watched(layer, self.family, self.wanted, self.widths.experts) as seen:
            after = [call(layer, entering_LD.to(device)).cpu()]
        for name, activation in seen.items():
            self._add(name, index, row, activation)
        if self.wanted.depth:  # in the order of the layers that they skip
            after += [call(layer, state_LD.to(device)).cpu() for state_LD in without]
            after.append(entering_LD)
        return after

    def _add(self, name: str, index: int, row: int, activation: Tensor) -> None:
        """Score a sample's activations `[L, units]`."""
        counted = activation[self.samples.counted_BL[row].to(activation.device)]
        if name == "groups":
            heads = counted.unflatten(-1, (self.widths.groups, self.widths.heads_per_group, self.widths.head))
            scores = torch.linalg.vector_norm(heads, dim=-1).sum(dim=-1)
        else:
            scores = counted.abs()
        square = scores.mean(dim=0).cpu().double().square()
        self.squares[name, index] = self.squares[name, index] + square if (name, index) in self.squares else square

    def _kl(self, head: Head, states: list[Tensor]) -> Tensor:
        """Return sums over positions of KL(first ‖ each other), from hidden states before the last norm."""
        kl_I = torch.zeros(len(states) - 1, dtype=torch.float64)
        for start in range(0, states[0].shape[0], CHUNK):
            chunks = (state_ND[start : start + CHUNK].to(self.teacher.device) for state_ND in states)
            log_probs = (head(self.teacher.norm(chunk)).log_softmax(dim=-1) for chunk in chunks)
            whole_NV = next(log_probs)
            probs_NV = whole_NV.exp()
            kl_I += torch.stack([(probs_NV * (whole_NV - other)).sum().cpu().double() for other in log_probs])
        return kl_I

    def result(self) -> Importance:
        """Return the importances that the sums give."""
        layers = range(len(self.teacher))

        def stacked(wanted: bool, kind: str, rows: range, units: int) -> Tensor | None:
            if not wanted:
                return None
            scores = torch.zeros(len(rows), units, dtype=torch.float64)
            for (name, row), square in self.squares.items():
                if name.startswith(kind):
                    scores[row] += square.sqrt()
            return scores

        return Importance(
            depth_I=self.kl_I / self.positions if self.wanted.depth else None,
            hidden_ID=stacked(self.wanted.hidden, "norm", range(len(self.teacher) + 1), self.widths.hidden),
            groups_IG=stacked(self.wanted.groups, "groups", layers, self.widths.groups),
            neurons_IF=stacked(self.wanted.neurons, "neurons", layers, self.widths.intermediate),
            experts_IE=stacked(self.wanted.experts, "experts", layers, self.widths.experts),
        )


@contextlib.contextmanager
def _watched(layer: nn.Module, family: Family, wanted: Wanted, experts: int) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping in which the wanted activations `[L, units]` of the layer's next call appear, by name."""
    seen: dict[str, Tensor] = {}

    def keep_input(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0][0]

    def keep_output(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output[0]

    def keep_choices(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        index_LK = args[1]
        seen["experts"] = index_LK.new_zeros(len(index_LK), experts, dtype=torch.float32).scatter(1, index_LK, 1.0)

    hooks = []
    for name, module in layer.named_modules():
        axes = family.axes_of(f"{name}.weight")
        if axes == "DF" and wanted.neurons:
            hooks.append(module.register_forward_pre_hook(partial(keep_input, "neurons")))
        elif axes == "DQ" and wanted.groups:
            hooks.append(module.register_forward_pre_hook(partial(keep_input, "groups")))
        elif axes == "D" and wanted.hidden:
            hooks.append(module.register_forward_hook(partial(keep_output, f"norm {name}")))
        elif name.endswith(".experts") and wanted.experts:
            hooks.append(module.register_forward_pre_hook(keep_choices))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _shown(layers: Iterable[int]) -> Iterator[int]:
    """Yield the same items, with a progress bar if there is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        layers, "importance of the teacher's layers", console=console, transient=True, disable=not sys.stderr.isatty()
    )
