"""A frozen teacher larger than the card: its layers pass through one buffer, read from disk once a batch.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.checkpoints import resolve
from distill.models.dequantized import full_tensors
from distill.models.filling import buffers_to, tie, without_own_value
from distill.models.huggingface import HuggingFaceLanguageModel, complain_about_missing, quiet_transformers
from distill.models.packed import PackedWeight
from distill.models.quantization import Quantization
from distill.models.quantized_copy import CopyPlan, CopyReader, packed_types
from distill.models.shapes import finder
from distill.models.streamed_copy import copy_of, host_bytes_of
from distill.models.streaming import Reader, Weights, WeightsReader, decoder_layers, place
from teachers.huggingface import resolve_dtype
from teachers.streamed_turns import Turns
from teachers.streamed_weights import Layer, LayerStream


def load_streamed_teacher(
    model: str,
    quantization: Quantization = "none",
    compute_dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    micro_batch: int | None = None,
    keep_layers: int = 0,
    host_memory: str | None = None,
    quantized_copy: str | None = None,
    allow_unquantized: bool = False,
) -> StreamedTeacher:
    """Load the frozen teacher with embeddings, last norm, head and its first `keep_layers` layers on `device`.

    Every batch reads the other layers once. `micro_batch` samples at a time go through a layer (None: the whole batch),
    so that batches can be large while activations stay small. Quantised, the layers are read from a copy of the
    checkpoint in the folder `quantized_copy`, which is made first if it is not there; `model` may be such a copy itself
    (`distill quantize`). `host_memory`, such as 16GB, keeps as many layers there. For `allow_unquantized` see class
    huggingface. Raises ValueError for a checkpoint that cannot be streamed. A forecast gets weights of any value and
    one micro-batch after the other; the next layer, which waits in the host's memory, is absent.
    """
    checkpoint = resolve(model, revision, trust_remote_code)
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}: give a number of samples from 1 up, or leave it out")
    kept = host_bytes_of(host_memory)
    dtype, name = resolve_dtype(compute_dtype, device), checkpoint.name
    has_weights = finder() is None
    with quiet_transformers():
        plan = CopyPlan(checkpoint, quantization, dtype, trust_remote_code, allow_unquantized)
    reader: Reader | None = None
    if has_weights and (quantization != "none" or checkpoint.is_copy):
        reader = CopyReader(copy_of(checkpoint, plan, quantized_copy, trust_remote_code))
    elif has_weights:
        reader = WeightsReader(Weights(plan.model, full_tensors(checkpoint), name))
    with quiet_transformers():
        teacher = StreamedTeacher(
            plan.model, packed_types(plan.model, plan.types), reader, device, name, micro_batch, keep_layers, kept
        )
    teacher.copy_bytes = 0 if quantization == "none" or checkpoint.is_copy else plan.nbytes
    teacher.check()
    return teacher


class StreamedTeacher(HuggingFaceLanguageModel):
    """A `transformers` model whose own forward runs, and whose layers have weights only while it is their turn."""

    copy_bytes = 0
    """Bytes of the quantised copy that this experiment keeps."""
    pace: tuple[float, float] | None = None
    """Seconds of the last run through the layers, and those in which layers were read meanwhile."""

    def __init__(
        self,
        model: Any,
        types: Mapping[str, torch.dtype],
        reader: Reader | None,
        device: str = "cpu",
        name: str = "the checkpoint",
        micro_batch: int | None = None,
        keep_layers: int = 0,
        host_memory: int = 0,
    ) -> None:
        """Set up `model`, which has no weights but may be packed; `types` are those of its tensors.

        `reader` reads them (None: nothing is read). `host_memory`: bytes of layers that stay in the host's memory.
        """
        super().__init__(model)
        layers = decoder_layers(model)
        if not 0 <= keep_layers <= len(layers):
            raise ValueError(f"keep_layers is {keep_layers}: {name} has {len(layers)} layers")
        self._name, self._micro_batch = name, micro_batch
        self._reader = reader
        self._turns: Turns | None = None
        self._prefixes = {index: prefix for index, prefix in enumerate(layers) if index >= keep_layers}
        weights = {name: tensor.to("meta", types[name]) for name, tensor in model.state_dict().items()}
        streamed: dict[int, Layer] = {}
        for index, prefix in self._prefixes.items():
            own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            streamed[index] = Layer(model.get_submodule(prefix.rstrip(".")), own)
            streamed[index].take(own)
            streamed[index].module.register_forward_pre_hook(partial(self._enter, index))
        fill = None if reader is None else self._fill
        self._stream = LayerStream(streamed, torch.device(device), fill, host_memory)
        self._load_rest({name: weight for name, weight in weights.items() if self._layer_of(name) is None}, device)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Return the hidden states `[B, L, D]` after the last norm. Raises the error of reading a layer."""
        size = self._micro_batch or max(len(input_ids_BL), 1)
        return torch.cat(self._together(list(zip(input_ids_BL.split(size), position_ids_BL.split(size), strict=True))))

    @torch.no_grad()
    def bodies(self, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return the hidden states of several batches, token ids and positions of each: every layer is read once."""
        size, passes, counts = self._micro_batch, [], []
        for ids_BL, positions_BL in groups:
            each = size or max(len(ids_BL), 1)
            split = list(zip(ids_BL.split(each), positions_BL.split(each), strict=True))
            passes += split
            counts.append(len(split))
        hidden = iter(self._together(passes))
        return [torch.cat([next(hidden) for _ in range(count)]) for count in counts]

    def _together(self, passes: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return the hidden states of passes that go through the layers together."""
        hidden: list[Any] = [None] * len(passes)

        def run(index: int) -> None:
            hidden[index] = super(StreamedTeacher, self).body(*passes[index])

        began, reading = time.perf_counter(), self._stream.reading
        try:
            if len(passes) > 1 and self._reader is not None:
                self._turns = Turns(len(passes), passes[0][0].device)
                self._turns.run(run)
            else:
                for index in range(len(passes)):
                    run(index)
            if self._reader is not None:
                if passes and passes[0][0].is_cuda:
                    torch.cuda.synchronize(passes[0][0].device)
                self.pace = time.perf_counter() - began, self._stream.reading - reading
            return hidden
        finally:
            self._turns = None
            self._stream.release()

    def check(self) -> None:
        """Check the head as for any model, but on random hidden states: its transformation needs no layer."""
        base, weight = getattr(self.model, self._base_name), self.model.get_output_embeddings().weight
        hidden_BLD = torch.randn(1, 8, weight.shape[1], generator=torch.Generator().manual_seed(0))
        wrapped = list(base.children())
        faked = [base, *wrapped] if len(wrapped) == 1 else [base]  # Bart's head asks the decoder in its base itself
        for module in faked:
            module.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=hidden_BLD.to(weight))
        try:
            super().check()
        finally:
            for module in faked:
                del module.forward

    @property
    def bytes_read(self) -> int:
        """Bytes that every batch reads from disk, as they lie there or in the compute dtype."""
        return self._stream.nbytes - self._stream.kept_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of layers in the host's memory, with the next one on its way to the device."""
        return self._stream.kept_bytes + self._stream.largest

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        """Wait before a layer runs until the other micro-batches have come as far, then give the layer its weights."""
        if self._turns is not None:
            self._turns.pause()
        self._stream.hold(index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the tensors that have memory, for all casts and moves of torch. A cast to another type is refused."""
        self._stream.release()
        here = self.model.get_input_embeddings().weight
        if fn(here.new_empty(0)).dtype != here.dtype:
            raise ValueError("a streamed teacher keeps the type it was made with: set compute_dtype")
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        self._stream.move(self.model.get_input_embeddings().weight.device)
        return self

    def _layer_of(self, name: str) -> int | None:
        """Return the streamed layer that a tensor of the model belongs to."""
        return next((index for index, prefix in self._prefixes.items() if name.startswith(prefix)), None)

    def _load_rest(self, weights: Mapping[str, Tensor], device: str) -> None:
        """Load everything outside the streamed layers, for good."""
        missing = set() if self._reader is None else without_own_value(self.model, self._reader.missing)
        absent = set() if self._reader is None else self._reader.missing
        where = device if self._reader is None else "cpu"  # a reader fills the host's memory
        here = {name: weight for name, weight in weights.items() if name not in absent}
        present = {name: torch.empty(each.shape, dtype=each.dtype, device=where) for name, each in here.items()}
        if self._reader is not None:
            self._reader.read(present)
        for name, tensor in present.items():
            place(self.model, name, tensor.to(device))
        if self._reader is None:
            self.model.tie_weights()
        else:  # the head that the checkpoint leaves out is the embedding, or the other way round
            streamed = [name for name in self.model.all_tied_weights_keys if self._layer_of(name) is not None]
            packed = [name for name, module in self.model.named_modules() if isinstance(module, PackedWeight)]
            tie(self.model, missing, [*streamed, *packed])
        complain_about_missing({"missing_keys": missing, "mismatched_keys": []}, self._name)
        buffers_to(self.model, device)

    def _fill(self, index: int, empty: dict[str, Tensor]) -> None:
        assert self._reader is not None
        prefix = self._prefixes[index]
        self._reader.read({prefix + name: tensor for name, tensor in empty.items()})


class _Hidden(SimpleNamespace):
    """Result of a base model with hidden states alone. Any other attribute that a family asks for is None."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]
