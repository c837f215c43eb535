"""Sizes of students of a wanted number of parameters that can be cut out of a teacher.

Every row of a matrix is a multiple of 32 wide where the family allows it, the block of llama.cpp's quantisations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill.models.checkpoints import load_config, resolve
from distill.models.huggingface import shape_of
from students.pruning_check import of_all_layers
from students.pruning_families import FAMILIES, Family
from students.pruning_stream import split_name
from students.pruning_width import Widths, narrowed_widths

BLOCK = 32
"""Weights of a row that llama.cpp quantises together."""
SHARES = (1.0, 0.83, 0.67, 0.55, 0.45, 0.35, 0.25)
"""Shares of a teacher's layers, channels and heads that are tried. The neurons follow from the wanted size."""
FEWEST_NEURONS = 0.15
"""Smallest share of the neurons: below it the other dimensions should give way."""
SHORT = 0.93
"""Share of the wanted parameters, or of the largest candidate's, that each has at least."""


@dataclass(frozen=True)
class _Cut:
    """Sizes of a student."""

    layers: int
    widths: Widths
    parameters: int
    imbalance: float
    """Spread of the logarithms of the kept shares of layers, channels and neurons, 0 if all are cut alike, and a little
    for heads that are cut."""


def candidate_sizes(
    parameters: int,
    count: int,
    teacher: str,
    teacher_revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Return up to `count` options of `pruned` whose students have at most `parameters`, the largest to train first.

    Of each number of layers the most even cut comes in first, then others. Families whose widths are not known, and
    mixtures of experts, are cut in depth alone, which leaves one. Raises ValueError if there is none, with the smallest
    and the largest.
    """
    config = load_config(resolve(teacher, teacher_revision, trust_remote_code), trust_remote_code)
    counted = _Counted.of(config, trust_remote_code)
    if not _is_known(config):
        smallest, largest = counted.total(1, None), counted.total(counted.layers, None)
        if not smallest <= parameters <= largest:
            raise ValueError(_impossible(parameters, smallest, largest))
        layers = max(each for each in range(1, counted.layers + 1) if counted.total(each, None) <= parameters)
        return [{"layers": layers}]
    teacher_widths = Widths.of(config)
    cuts = sorted(_cuts(parameters, config, counted), key=lambda cut: (cut.imbalance, -cut.layers))
    if not cuts:
        few = replace(teacher_widths, intermediate=max(BLOCK, teacher_widths.intermediate // 8))
        smallest, largest = counted.total(1, few), counted.total(counted.layers, teacher_widths)
        raise ValueError(_impossible(parameters, smallest, largest))
    most = max(cut.parameters for cut in cuts)  # of a tiny teacher, whose sizes come in coarse steps
    cuts = [cut for cut in cuts if cut.parameters >= SHORT * most]
    best_of_depth = {cut.layers: cut for cut in reversed(cuts)}.values()
    chosen = sorted(best_of_depth, key=lambda cut: cut.imbalance)[:count]
    chosen += [cut for cut in cuts if cut not in chosen][: count - len(chosen)]
    chosen.sort(key=lambda cut: cut.layers * (cut.widths.hidden + cut.widths.intermediate), reverse=True)
    return [_options(cut, counted.layers, teacher_widths) for cut in chosen]


def _is_known(config: Any) -> bool:
    """Tell whether a model can be cut to any number of neurons."""
    if config.model_type not in FAMILIES or "intermediate_size" in FAMILIES[config.model_type].fixed:
        return False
    try:
        narrowed_widths(config)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class _Counted:
    """The parameters of a teacher as products of sizes."""

    layers: int
    config: Any
    outer: list[tuple[str, tuple[int, ...]]]
    """Axes and lengths of each tensor outside the layers."""
    inner: dict[int, list[tuple[str, tuple[int, ...]]]]
    """Axes and lengths of each tensor of each layer."""

    @classmethod
    def of(cls, config: Any, trust_remote_code: bool) -> _Counted:
        with torch.device("meta"):
            model = shape_of(config, torch.float32, trust_remote_code)
        family = FAMILIES.get(config.model_type, Family())
        outer: list[tuple[str, tuple[int, ...]]] = []
        inner: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        for name, weight in model.named_parameters():  # a tied head once
            layer, local = split_name(name)
            axes = family.axes_of(local) or "." * weight.dim()
            part = of_all_layers(weight, name, config, [0])
            if part is not weight:  # each layer has its part
                for number in range(config.num_hidden_layers):
                    inner.setdefault(number, []).append((axes, tuple(part.shape)))
            else:
                (outer if layer is None else inner.setdefault(layer, [])).append((axes, tuple(weight.shape)))
        return cls(config.num_hidden_layers, config, outer, inner)

    def total(self, layers: int, widths: Widths | None) -> int:
        """Return the parameters with the largest so many layers: nobody knows yet which ones stay."""
        sizes = [sum(_size(axes, shape, widths) for axes, shape in layer) for layer in self.inner.values()]
        outside = sum(_size(axes, shape, widths) for axes, shape in self.outer)
        return outside + sum(sorted(sizes, reverse=True)[:layers])


def _size(axes: str, shape: tuple[int, ...], widths: Widths | None) -> int:
    lengths = {} if widths is None else widths.axes()
    return math.prod(lengths.get(axis, length) for axis, length in zip(axes, shape, strict=True))


def _cuts(parameters: int, config: Any, counted: _Counted) -> Iterator[_Cut]:
    whole = Widths.of(config)
    depths = sorted({max(1, round(share * counted.layers)) for share in SHARES})
    fixed_groups = "key_value_groups" in FAMILIES[config.model_type].fixed
    for groups in [whole.groups] if fixed_groups else sorted({max(1, round(share * whole.groups)) for share in SHARES}):
        for hidden in _hidden_sizes(config, replace(whole, groups=groups)):
            for layers in depths:
                narrow = replace(whole, hidden=hidden, groups=groups, intermediate=0)
                fixed = counted.total(layers, narrow)
                each = counted.total(layers, replace(narrow, intermediate=1)) - fixed
                neurons = min(whole.intermediate, (parameters - fixed) // each // BLOCK * BLOCK)
                if neurons < max(FEWEST_NEURONS * whole.intermediate, BLOCK):
                    continue
                widths = replace(narrow, intermediate=int(neurons))
                total = counted.total(layers, widths)
                if total <= parameters:
                    yield _Cut(layers, widths, total, _imbalance(layers / counted.layers, widths, whole))


def _imbalance(depth: float, widths: Widths, whole: Widths) -> float:
    shares = depth, widths.hidden / whole.hidden, widths.intermediate / whole.intermediate
    logarithms = [math.log(share) for share in shares]
    mean = sum(logarithms) / len(logarithms)
    return sum((one - mean) ** 2 for one in logarithms) + 0.1 * math.log(widths.groups / whole.groups) ** 2


def _hidden_sizes(config: Any, widths: Widths) -> list[int]:
    """Return the hidden sizes to try with so many groups: multiples of a block that the family can load again."""
    if "hidden_size" in FAMILIES[config.model_type].fixed:
        return [widths.hidden]
    heads = widths.groups * widths.heads_per_group
    step = math.lcm(BLOCK, heads)  # llama asks for a hidden size that its heads divide; for others it does no harm
    near = {max(step, round(share * widths.hidden / step) * step) for share in SHARES}
    whole = {widths.hidden} if widths.hidden % heads == 0 else set()
    return sorted(whole | {size for size in near if size <= widths.hidden})


def _options(cut: _Cut, layers: int, whole: Widths) -> dict[str, Any]:
    options: dict[str, Any] = {"layers": cut.layers}
    if cut.layers < layers:
        options["depth"] = "importance"
    sizes = {
        "hidden_size": (cut.widths.hidden, whole.hidden),
        "intermediate_size": (cut.widths.intermediate, whole.intermediate),
        "key_value_groups": (cut.widths.groups, whole.groups),
    }
    return options | {name: size for name, (size, most) in sizes.items() if size < most}


def _impossible(parameters: int, smallest: int, largest: int) -> str:
    return f"no student of {parameters:,} parameters can be cut out of this teacher: {smallest:,} to {largest:,} can be"
