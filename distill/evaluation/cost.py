"""The cost of using a model: bytes on disk and in memory, and tokens a second for reading and writing.

Shapes: B batch, L sequence length.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.models.generation import Decoder, context_length, decoder, has_cache
from distill.models.language_model import LanguageModel
from distill.system.memory import is_out_of_memory

SECONDS = 0.5
"""Seconds that a rate is measured for in a round, at least; once is the minimum."""
ROUNDS = 3
"""Rounds in which the models are measured in turn, so that other work of the machine does not meet one model alone."""
REPEATS = 5
"""Largest number of readings of the prompt. Its time is their median."""


@torch.no_grad()
def measure_cost(
    model: LanguageModel,
    *,
    vocab_size: int,
    device: torch.device,
    batch_sizes: Sequence[int],
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    weight_files: Iterable[Path] = (),
    with_memory: bool = True,
) -> dict[str, Any]:
    """Measure the speed and memory of `model`, which is in evaluation mode on `device`.

    * `bytes_on_disk`: bytes of the `weight_files`; absent without any
    * `weight_bytes`: bytes of parameters and buffers as they lie in memory, see `weight_bytes`
    * `peak_bytes`: `weight_bytes` plus the most bytes of other tensors at one time, while the largest of the batches
      that fit reads all its tokens but one and then writes one. The count is the same on every device: it sees
      everything that torch's operators return, but neither scratch inside an operator nor the reserve of an allocator.
      It is the same in every round, and absent unless `with_memory`
    * `prefill`, `decode`: tokens a second at each batch size (a string) for reading prompts and for writing after them,
      the median of several prompts or steps after a warm-up; None for a batch that does not fit in memory
    * `kv_cache`: True if a token is written without reading the text before it again
    * `prompt_tokens`, `new_tokens`: the lengths of these texts: the given ones, or shorter ones in the same proportion
      if the model's context is shorter. Slow models write fewer new tokens: as many as `SECONDS` allow, 2 at least.
    """
    limit = context_length(model)
    total = prompt_tokens + new_tokens if limit is None else min(limit, prompt_tokens + new_tokens)
    new_tokens = max(1, total * new_tokens // (prompt_tokens + new_tokens))
    prompt_tokens = max(1, total - new_tokens)
    files = list(weight_files)
    result: dict[str, Any] = {"bytes_on_disk": sum(file.stat().st_size for file in files)} if files else {}
    result["weight_bytes"] = weight_bytes(model)
    generator = torch.Generator().manual_seed(0)
    size = (max(batch_sizes), prompt_tokens + new_tokens)
    ids_BL = torch.randint(0, vocab_size, size, generator=generator).to(device)
    if not with_memory:
        _if_it_fits(lambda rows: _read(model, rows, vocab_size), ids_BL[: min(batch_sizes)])  # to warm up
    for batch_size in (
        sorted(batch_sizes, reverse=True) if with_memory else ()
    ):  # the first that fits; it warms the others up
        grown = _if_it_fits(lambda rows: peak_growth(model, rows, vocab_size), ids_BL[:batch_size])
        if grown is not None:
            result["peak_bytes"] = result["weight_bytes"] + grown
            break
    prefill: dict[str, float | None] = {}
    decode: dict[str, float | None] = {}
    for batch_size in sorted(batch_sizes):
        rates = _if_it_fits(lambda rows: _rates(model, rows, prompt_tokens, vocab_size), ids_BL[:batch_size])
        prefill[str(batch_size)], decode[str(batch_size)] = rates or (None, None)
    result |= {"prefill": prefill, "decode": decode, "kv_cache": has_cache(model)}
    return {**result, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}


def join_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join what `measure_cost` returned for one model in several rounds.

    `prefill` and `decode` become the medians of the rounds (None if a batch did not fit in one of them), and `rounds`
    holds the rates of each round by phase and batch size. The rest is that of the first round.
    """
    result = {**rounds[0], "rounds": {}}
    for phase in ("prefill", "decode"):
        every = {size: [each[phase][size] for each in rounds] for size in rounds[0][phase]}
        result["rounds"][phase] = {size: rates for size, rates in every.items() if None not in rates}
        result[phase] = {size: None if None in rates else statistics.median(rates) for size, rates in every.items()}
    return result


def weight_bytes(model: LanguageModel) -> int:
    """Return the bytes of a module's parameters and buffers, tied ones once.

    4- and 8-bit weights count as packed, with their scales.
    """
    assert isinstance(model, torch.nn.Module)
    found: dict[int, int] = {}
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), getattr(module, "state", None))
        for tensor in (inner for thing in own for inner in _stored(thing)):
            found[tensor.data_ptr()] = max(found.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(found.values())


def _stored(thing: Any) -> Iterator[Tensor]:
    """Yield the plain tensors behind a parameter or a bitsandbytes state."""
    if hasattr(thing, "__tensor_flatten__"):  # a tensor made of others, such as torchao's
        for name in thing.__tensor_flatten__()[0]:
            yield from _stored(getattr(thing, name))
    elif isinstance(thing, Tensor):
        yield thing
        yield from _stored(getattr(thing, "quant_state", None))
        yield from _stored(getattr(thing, "SCB", None))
    elif type(thing).__module__.startswith("bitsandbytes."):
        for inner in vars(thing).values():
            yield from _stored(inner)


def peak_growth(model: LanguageModel, ids_BL: Tensor, vocab_size: int) -> int:
    """Return the most bytes beside the weights that a batch needs at one time.

    The batch reads all its tokens but the last, then the last.
    """
    with LiveTensors(ids_BL.device) as live:
        _read(model, ids_BL, vocab_size)
    return live.peak


def _read(model: LanguageModel, ids_BL: Tensor, vocab_size: int) -> None:
    decode = decoder(model, vocab_size)
    decode(ids_BL[:, :-1])
    decode(ids_BL[:, -1:])


class LiveTensors(TorchDispatchMode):
    """A count of the bytes of all tensors that operators make on a device while it is entered, from birth to death.

    Unlike the peak of the CUDA allocator it needs no reset, which would disturb the peak of the whole command.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type
        self.bytes = 0
        """Bytes of the living tensors."""
        self.peak = 0
        """Most bytes at one time."""
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        answer = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor) and tensor.device.type == self._kind:
                self._count(tensor, known)
        return answer

    def _count(self, tensor: Tensor, known: set[int]) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in known or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.bytes -= self._alive.pop(key, 0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _rates(model: LanguageModel, ids_BL: Tensor, prompt_tokens: int, vocab_size: int) -> tuple[float, float]:
    """Return tokens a second of reading prompts and of writing after them, over the whole batch."""
    batch_size, tokens = ids_BL.shape
    reading: list[float] = []
    while not reading or (len(reading) < REPEATS and sum(reading) < SECONDS):
        decode = decoder(model, vocab_size)
        logits_BV, seconds = _timed(decode, ids_BL[:, :prompt_tokens])
        reading.append(seconds)
    writing: list[float] = []
    while len(writing) < tokens - prompt_tokens and (len(writing) < 2 or sum(writing) < SECONDS):
        logits_BV, seconds = _timed(decode, logits_BV.argmax(dim=-1, keepdim=True))
        writing.append(seconds)
    return batch_size * prompt_tokens / statistics.median(reading), batch_size / statistics.median(writing)


def _timed(decode: Decoder, ids_BL: Tensor) -> tuple[Tensor, float]:
    """Return the decoder's answer, and the seconds until it is there."""
    _wait(ids_BL.device)
    started = time.perf_counter()
    logits_BV = decode(ids_BL)
    _wait(ids_BL.device)
    return logits_BV, max(time.perf_counter() - started, 1e-9)


def _wait(device: torch.device) -> None:
    """Wait for the device, because it works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _if_it_fits(function: Callable[[Tensor], Any], ids_BL: Tensor) -> Any:
    """Return the function's answer, or None if its tensors find no room."""
    try:
        return function(ids_BL)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # the error's frames held the tensors
    if ids_BL.device.type == "cuda":
        torch.cuda.empty_cache()
    return None
