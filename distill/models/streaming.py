"""A model's weights read from its checkpoint a few at a time, for models that are larger than the memory at hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.errors import UserError, first_line
from distill.models.huggingface import complain_about_missing, quiet_transformers
from distill.models.text_part import construct, sees


class Source(Protocol):
    """Tensors by name, read when asked for: `distill.models.tensors`."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...


def without_weights(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Make the `transformers` model: parameters without memory, but buffers (rotary frequencies) with values."""
    import accelerate

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # its weights are dequantised while they are read
        del config.quantization_config
    with quiet_transformers(), accelerate.init_empty_weights(include_buffers=False):
        return construct(config, dtype, trust_remote_code)


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a frozen tensor in the place of a module's parameter or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def decoder_layers(model: Any) -> list[str]:
    """Return the names' prefixes (`model.layers.0.`) of a model's layers: the list of modules that holds most weights.

    The layers of eyes and ears are no such list. Raises ValueError if there is none.
    """
    sizes = {
        name: sum(parameter.nbytes for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not sees(name)
    }
    if not sizes:
        raise ValueError(f"{type(model).__name__} keeps its layers in no nn.ModuleList: it cannot be streamed")
    name = max(sizes, key=lambda name: sizes[name])
    return [f"{name}.{index}." for index in range(len(model.get_submodule(name)))]


class Reader(Protocol):
    """Reader of a model's weights by their names in it."""

    missing: set[str]
    """Names that the checkpoint lacks."""

    def read(self, empty: Mapping[str, Tensor]) -> None:
        """Fill CPU tensors, all of them, cast to their types."""


class Weights:
    """The weights of a model by their names in it, each read from a checkpoint when it is asked for."""

    def __init__(self, model: Any, source: Source, name: str) -> None:
        """Look up where the weights of `model`, which has none, lie in `source`; `name` is the checkpoint's."""
        self._model, self._source, self.name = model, source, name
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._readings, self.unknown = _readings(model, source.names())
        self.missing = set(self._shapes) - {name for reading in self._readings for name in reading.makes}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of these names, in the type in which they are stored.

        No tensor is kept here while the next is read. Raises UserError, at the end, for names that the checkpoint
        lacks, and for a tensor of another shape.
        """
        for name, _, tensor in self.read_in_slices(names, ()):
            yield name, tensor
            del tensor

    def read_in_slices(
        self, names: Collection[str], sliced: Collection[str]
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield as `read` does, but a tensor of `sliced` in slices along its first axis, with their numbers, where it
        can be made one slice at a time: a mixture's experts that the checkpoint has one by one.
        """
        missing = set(names)
        for reading in self._readings:
            if reading.makes[0] not in missing:
                continue
            slices = reading.slices if reading.makes[0] in sliced else 0
            for index in range(slices) or (None,):
                for name, tensor in reading.tensors(self._source, _Unpacked(self._model, self._shapes), index):
                    expected = self._shapes[name] if index is None else (1, *self._shapes[name][1:])
                    if tensor.shape != expected or (slices and slices != self._shapes[name][0]):
                        found = tensor.shape if index is None else (slices, *tensor.shape[1:])
                        misshapen = [(name, found, self._shapes[name])]
                        complain_about_missing({"missing_keys": [], "mismatched_keys": misshapen}, self.name)
                    missing.discard(name)
                    yield name, index, tensor if index is None else tensor[0]
                    del tensor
        complain_about_missing({"missing_keys": missing, "mismatched_keys": []}, self.name)


class WeightsReader:
    """A reader of a checkpoint's own tensors, for models that are not packed."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.missing = weights, weights.missing

    @torch.no_grad()
    def read(self, empty: Mapping[str, Tensor]) -> None:
        for name, tensor in self._weights.read(empty):
            empty[name].copy_(tensor)
            del tensor  # before the next is read


@dataclass
class _Reading:
    """The way in which transformers makes tensors of a model from tensors of its checkpoint, by its own tables.

    Mostly one tensor comes from one, perhaps under another name. A mixture's experts, stored one by one, become one
    tensor.
    """

    makes: list[str]
    """Names in the model. transformers names a conversion by the first."""
    stored: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of transformers' pattern and the name in the checkpoint."""
    converter: Any = None

    @property
    def slices(self) -> int:
        """Number of slices that can be made one by one; 0 where the tensor is made as a whole."""
        from transformers import core_model_loading as loading

        counts = Counter(pattern for pattern, _ in self.stored)
        if self.converter is None or len(set(counts.values())) != 1:
            return 0
        first, *rest = self.converter.operations
        is_list = isinstance(first, loading.MergeModulelist) and first.dim == 0
        within = all(isinstance(op, loading.Concatenate) and op.dim > 0 for op in rest)
        return next(iter(counts.values())) if is_list and within else 0

    def tensors(self, source: Source, model: Any, index: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by their names in the model, in the type in which they are stored; or one of `slices`."""
        if self.converter is None:
            yield self.makes[0], source.read(self.stored[0][1])
            return
        converter = copy.deepcopy(self.converter)
        seen: Counter[str] = Counter()
        for pattern, name in self.stored:
            if index in (None, seen[pattern]):
                converter.add_tensor(self.makes[0], name, pattern, partial(source.read, name))
            seen[pattern] += 1
        try:
            found = converter.convert(self.makes[0], model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError) as error:  # torch says which shapes do not fit together
            what = f"{self.stored[0][1]} and its like do not make {self.makes[0]}"
            raise UserError(f"the checkpoint's {what}: {first_line(error)}") from error
        for name, made in found.items():
            yield name, made[0] if isinstance(made, list) else made


class _Unpacked:
    """A model for transformers' conversions: they ask it for the shape of a parameter, which may be packed already."""

    def __init__(self, model: Any, shapes: Mapping[str, torch.Size]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _readings(model: Any, stored: Iterable[str]) -> tuple[list[_Reading], list[str]]:
    """Return how every tensor of `model` (on the meta device) is read, and the stored tensors that it lacks."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, _Reading] = {}
    unknown: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        made, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if made not in expected and name in expected:  # a rule for other tensors renamed it
            made, pattern = name, None
        if made not in expected:
            unknown.append(name)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        makes = [made]
        if converter is not None:
            targets = converter.target_patterns
            makes = [made.replace(targets[0], target) for target in targets]
        found.setdefault(made, _Reading(makes, converter=converter)).stored.append((pattern or name, name))
    return list(found.values()), unknown


def types_as_loaded(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return each tensor's type when transformers loads `model` in `dtype`: some families keep a few in float32."""
    return {name: tensor.dtype for name, tensor in model.state_dict().items()} | kept_wider(model, dtype)


def kept_wider(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the types of those tensors alone that the family keeps wider than `dtype`."""
    from transformers.core_model_loading import build_glob_alternation

    types: dict[str, torch.dtype] = {}
    for pattern, wider in model._get_dtype_plan(dtype).items():
        search = build_glob_alternation([pattern])[0].search
        types.update({name: wider for name in model.state_dict() if search(name)})
    return types
