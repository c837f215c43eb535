"""The world without memory: inside, whatever makes a tensor makes a fake one, and programs run as if it were real.

Fake tensors are on the CPU, for fake CUDA tensors need a CUDA build of torch; where a CUDA device does something else
than a CPU, the way of the device is put in its place (`distill.forecast.simulation.cuda`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill import plugins
from distill.forecast.simulation.cuda import as_on_cuda
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.quantized import ScaledLinear, packed_linear
from distill.forecast.simulation.values import Arrays, Values
from distill.models import huggingface, quantization, tensors
from distill.system import interrupt


@contextmanager
def without_memory(device: DeviceKind, integer: int = 1) -> Iterator[Values]:
    """Tensors made inside have shapes and types and no memory; those from outside are taken as fake ones.

    Checkpoints are not read: a model gets the shapes that its configuration gives, so that a folder with nothing but a
    `config.json` will do. `integer`: see `Values`. Ctrl-C and SIGTERM wait for the next kernel, or the end: raised
    inside torch's fake mode, they leave it broken, and come out as errors of other kinds.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(interrupt.held_back())
        for holder, name, stand_in in _STAND_INS:
            stack.enter_context(mock.patch.object(holder, name, stand_in))
        for kind, stand_ins in _WITHOUT_WEIGHTS.items():
            stack.enter_context(mock.patch.dict(plugins.BUILT_IN[kind], stand_ins))
        # transformers loads in several threads, and each would have modes of its own.
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        stack.enter_context(_own_caches())
        stack.enter_context(fake)
        values = stack.enter_context(Values(fake, integer))
        stack.enter_context(Arrays())
        if device == "cuda":
            stack.enter_context(as_on_cuda())
        yield values


def _take_over(old: Tensor, new: Tensor) -> None:
    """For `nn.Module.to`: what torch does to a fake parameter, which it refuses because the mode itself knows of it."""
    old.data = new.data


def _from_config(folder: Any, **options: Any) -> Any:
    """For `AutoModelForCausalLM.from_pretrained(…, output_loading_info=True)`: the shapes alone."""
    import transformers

    config = options.get("config") or transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=options.get("trust_remote_code", False)
    )
    settings = options.get("quantization_config")
    if isinstance(settings, transformers.GgufConfig):  # its file is dequantised first, and then treated as any other
        settings = None
    dtype, trust = options["dtype"], options.get("trust_remote_code", False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    if settings is not None:
        quantization.quantize_linears(model, "nf4" if settings.load_in_4bit else "int8", dtype, "cpu")
    return model, {"missing_keys": [], "mismatched_keys": []}


def _quantized(weight: Tensor, bias: Any, kind: quantization.Quantization, dtype: torch.dtype) -> torch.nn.Module:
    return packed_linear(weight, bias, dtype) if kind == "nf4" else ScaledLinear(weight, bias)


class _FromConfig:
    """For `transformers.AutoModelForCausalLM`: as it is, but for its weights."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return _from_config if name == "from_pretrained" else getattr(self.original, name)


def _no_files(self: Any, checkpoint: Any) -> None:
    self._checkpoint, self._places, self._loaded = checkpoint, {}, None


_STAND_INS: list[tuple[Any, str, Any]] = [
    (torch.utils, "swap_tensors", _take_over),
    (quantization, "_quantized", _quantized),
    (huggingface.HuggingFaceLanguageModel, "check", lambda self: None),  # it compares values
    (huggingface, "weight_files", lambda checkpoint: []),
    (tensors.Tensors, "__init__", _no_files),
    (tensors.Tensors, "names", lambda self: sorted(self._dequantised())),
    (tensors.Tensors, "read", lambda self, name: self._dequantised()[name]),
]


# Models that are made from a checkpoint's weights in a way of their own: which functions make their shapes without.
_WITHOUT_WEIGHTS = {
    "teacher": {"streamed": "teachers.streamed:shape_of_streamed"},
    "student": {"pruned": "students.pruned:shape_of_pruned"},
}


@contextmanager
def _own_caches() -> Iterator[None]:
    """Tensors that libraries keep for later must not be fake ones when somebody real asks."""
    import transformers
    from bitsandbytes import functional

    from distill.training.optimizers import moments

    caches = moments._dynamic_map, moments._four_bit_map
    automatic = mock.patch.object(transformers, "AutoModelForCausalLM", _FromConfig(transformers.AutoModelForCausalLM))
    try:
        for cache in caches:
            cache.cache_clear()
        with mock.patch.dict(functional.name2qmap), automatic:
            yield
    finally:
        for cache in caches:
            cache.cache_clear()
