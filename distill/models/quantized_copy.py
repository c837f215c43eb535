"""A quantised copy of a checkpoint: a folder with a file a layer, which streamed and resident teachers read.

The folder opens under its name like any checkpoint. Its manifest (`quantized.json`) says of what it is a copy, and has
the hash of each file. A copy that was begun has a journal of the same form in its place, and is continued.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import HUB_FILES, Checkpoint, fingerprints, load_config
from distill.models.dequantized import check_format, full_tensors
from distill.models.filling import buffers_to, with_generation_config
from distill.models.huggingface import quiet_transformers
from distill.models.packed import PackedWeight
from distill.models.packing import Packing, pack_in_place, packing_of
from distill.models.quantized_manifest import BEGUN, MANIFEST, QuantizedManifest, is_finished, read_manifest
from distill.models.shapes import finder
from distill.models.streaming import Weights, decoder_layers, place, types_as_loaded, without_weights
from distill.models.tensor_files import TensorFile
from distill.models.tokenizers import load_tokenizer
from distill.system.files import TEMPORARY, sha256_of, sole_writer, sync_file, sync_folder, write_durably
from distill.system.units import size

REST = "rest.safetensors"
OTHER = "is a copy of another checkpoint, in another quantisation or type: name another folder"
_CONFIG = "config.json"


def layer_file(index: int) -> str:
    """Return the name of a layer's file."""
    return f"layer-{index:05d}.safetensors"


class CopyPlan:
    """The parts of a quantised copy: a model without weights whose matrices are packed, and its tensors by file."""

    def __init__(
        self, checkpoint: Checkpoint, quantization: str, dtype: torch.dtype, trust_remote_code: bool, allow: bool
    ) -> None:
        """Decide how each matrix is kept. Raises UserError if too much stays unquantised."""
        self.checkpoint, self.quantization, self.dtype = checkpoint, quantization, dtype
        check_format(checkpoint)
        self.model = without_weights(load_config(checkpoint, trust_remote_code), dtype, trust_remote_code)
        self.types = types_as_loaded(self.model, dtype)
        self.packing = Packing() if quantization == "none" else packing_of(self.model)
        self.packing.check(checkpoint.name, quantization, dtype, allow)
        self.plain_model = without_weights(load_config(checkpoint, trust_remote_code), dtype, trust_remote_code)
        self.whole = self.packing.in_place()
        pack_in_place(self.model, self.whole, quantization, dtype, "meta")
        self.prefixes = decoder_layers(self.plain_model)

    def files(self) -> dict[str, list[str]]:
        """Return the names of the plain model's tensors by the file that they belong to, the rest first."""
        found: dict[str, list[str]] = {REST: [], **{layer_file(index): [] for index in range(len(self.prefixes))}}
        for name in self.types:
            index = next((index for index, prefix in enumerate(self.prefixes) if name.startswith(prefix)), None)
            found[REST if index is None else layer_file(index)].append(name)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the copy's weights."""
        types = packed_types(self.model, self.types)
        return sum(tensor.numel() * types[name].itemsize for name, tensor in self.model.state_dict().items())


def packed_types(model: Any, types: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the type of each tensor of a packed model; `types` are those of the model before."""
    return {name: types.get(name, tensor.dtype) for name, tensor in model.state_dict().items()}


def write_copy(
    plan: CopyPlan, folder: Path, trust_remote_code: bool = False, advance: Callable[[int], None] = lambda count: None
) -> QuantizedManifest:
    """Write a copy layer by layer, or the rest of one that was begun; the same bytes come out.

    `advance` is called after each finished file. Raises UserError for a folder of something else, a full disk,
    and weights that are missing.
    """
    manifest = identity_of(plan, trust_remote_code)
    known = _hashes_in(folder, manifest)
    with sole_writer(folder):
        write_durably(folder / BEGUN, manifest.as_json())
        _copy_small_files(plan.checkpoint, folder)
        weights = Weights(plan.plain_model, full_tensors(plan.checkpoint), plan.checkpoint.name)
        sources = _sources(plan, weights)
        for file, names in plan.files().items():
            path = folder / file
            digest = sha256_of(path) if path.is_file() else None
            if digest is None or digest != known.get(file, digest):
                _write(plan, weights, sources, names, path)
                digest = sha256_of(path)
            manifest.files[file] = digest
            advance(1)
        write_durably(folder / MANIFEST, manifest.as_json())
        (folder / BEGUN).unlink()
    return manifest


def verify_copy(plan: CopyPlan, folder: Path, trust_remote_code: bool = False) -> None:
    """Raise UserError for a finished copy of something else, and for files with other content."""
    found = read_manifest(folder)
    if found.identity != identity_of(plan, trust_remote_code).identity:
        raise UserError(f"{folder}: {OTHER}")
    found.check(folder)


def identity_of(plan: CopyPlan, trust_remote_code: bool) -> QuantizedManifest:
    """Return the manifest of a copy that has no files yet."""
    kept = plan.packing.describe(plan.quantization) if plan.quantization != "none" else "none"
    source = fingerprints(plan.checkpoint, trust_remote_code)
    return QuantizedManifest(plan.quantization, kept, str(plan.dtype).removeprefix("torch."), source)


def _hashes_in(folder: Path, wanted: QuantizedManifest) -> dict[str, str]:
    """Return the hashes of a copy that was finished once. Raises UserError for a folder that holds other things."""
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not found:
        return {}
    if BEGUN not in found and MANIFEST not in found:
        raise UserError(f"{folder}: holds other files (such as {sorted(found)[0]}): name a new folder")
    begun = read_manifest(folder, begun=BEGUN in found)
    if begun.identity != wanted.identity:
        raise UserError(f"{folder}: {OTHER}")
    return begun.files


def check_room(plan: CopyPlan, folder: Path) -> None:
    """Raise UserError if the disk has no room for what is still to be written."""
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed, free = plan.nbytes - there, shutil.disk_usage(nearest).free
    if needed > free:
        raise UserError(
            f"{folder}: the quantised copy takes {size(needed)} more, {size(free)} are free: free room or name a "
            "folder on another disk"
        )


def _sources(plan: CopyPlan, weights: Weights) -> dict[str, str]:
    """Return each name's place in the checkpoint: a tied weight lies there under one of its names."""
    tied = dict(plan.plain_model.all_tied_weights_keys or {})
    partners: dict[str, list[str]] = {}
    for target, source in tied.items():
        for one, other in ((target, source), (source, target)):
            partners.setdefault(one, []).append(other)
        partners[target] += [other for other, its in tied.items() if its == source and other != target]
    found = {}
    for name in plan.types:
        if name in weights.missing:
            found[name] = next((other for other in partners.get(name, []) if other not in weights.missing), name)
        else:
            found[name] = name
    return found


@torch.no_grad()
def _write(plan: CopyPlan, weights: Weights, sources: Mapping[str, str], names: list[str], path: Path) -> None:
    """Write one file: read its tensors one at a time, and pack them."""
    own = {name: tensor for name, tensor in plan.plain_model.named_buffers() if not tensor.is_meta}
    made: dict[str, Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    wanted: dict[str, list[str]] = {}
    for name in names:
        if sources[name] in weights.missing and name in own:
            made[name] = own[name].to(plan.types[name]).contiguous()
        else:
            wanted.setdefault(sources[name], []).append(name)
    owners = {name: plan.whole.shared.get(name, name) for name in names}
    for source, index, tensor in weights.read_in_slices(list(wanted), set(plan.whole.own)):
        for name in wanted[source]:
            if owners[name] in plan.whole.own:
                if name not in packed:
                    shape, slices = plan.model.get_submodule(name).shape, plan.whole.own[owners[name]]
                    packed[name] = PackedWeight(shape, plan.dtype, plan.quantization, slices)
                packed[name].fill(tensor.T if name in plan.whole.transposed else tensor, index)
            else:
                made[name] = tensor.to(plan.types[name], copy=True).contiguous()
        del tensor
    for name, weight in packed.items():
        made.update({f"{name}.{part}": value.data for part, value in weight.state_dict().items()})
    temporary = path.with_name(path.name + TEMPORARY)
    save_file(made, temporary, metadata={"format": "pt"})
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def _copy_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, template and configuration, which then says nothing of the checkpoint's own quantisation.

    Those of a GGUF file are written anew.
    """
    if checkpoint.gguf_file is not None:
        with quiet_transformers():
            with contextlib.suppress(UserError):  # a file without one is used with `teacher.tokenizer`
                load_tokenizer(checkpoint).save_pretrained(folder)
            write_durably(folder / _CONFIG, load_config(checkpoint).to_json_string().encode())
        return
    for pattern in HUB_FILES:
        for file in sorted(checkpoint.folder.glob(pattern)):
            if file.name not in (_CONFIG, MANIFEST, BEGUN) and "safetensors" not in file.name:
                write_durably(folder / file.name, file.read_bytes())
    config = json.loads((checkpoint.folder / _CONFIG).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_durably(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


class CopyReader:
    """The tensors of a finished copy, read straight into their places. Its files are opened once."""

    def __init__(self, folder: Path) -> None:
        self._files = [TensorFile(folder / name) for name in read_manifest(folder).files]
        self._places = {name: file for file in self._files for name in file.names()}
        self.missing: set[str] = set()

    def read(self, empty: Mapping[str, Tensor]) -> None:
        """Fill CPU tensors by their names in the packed model. Raises UserError for one that is not there."""
        for name, tensor in empty.items():
            if name not in self._places:
                raise UserError(f"the quantised copy lacks {name}: make it anew")
            self._places[name].read_into(name, tensor)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files)


def load_copy(
    checkpoint: Checkpoint, quantization: str, dtype: torch.dtype, device: str, trust_remote_code: bool
) -> Any:
    """Load the model of a copy whole, on `device`. Raises ValueError for one that is not as asked."""
    check_copy(checkpoint, quantization, dtype)
    plan = CopyPlan(checkpoint, quantization, dtype, trust_remote_code, allow=True)
    model, types = plan.model, packed_types(plan.model, plan.types)
    reader = None if finder() is not None else CopyReader(checkpoint.folder)
    for name, tensor in list(model.state_dict().items()):
        read = torch.empty(tensor.shape, dtype=types[name])
        if reader is not None:
            reader.read({name: read})
        place(model, name, read.to(device))
    model.tie_weights()
    buffers_to(model, device)
    return with_generation_config(model, checkpoint).eval().requires_grad_(False)


def check_copy(checkpoint: Checkpoint, quantization: str, dtype: torch.dtype) -> None:
    """Raise ValueError if a copy is not as the experiment asks."""
    manifest, wanted = read_manifest(checkpoint.folder), str(dtype).removeprefix("torch.")
    if manifest.quantization != quantization:
        raise ValueError(f"{checkpoint.name} is a copy in {manifest.quantization}: set teacher.quantization to that")
    if manifest.compute_dtype != wanted:
        raise ValueError(
            f"{checkpoint.name} is a copy for {manifest.compute_dtype}: set teacher.compute_dtype to that, or make "
            f"another with `distill quantize --compute_dtype {wanted}`"
        )


def wait_for_copy(folder: Path, work: Callable[[], Any]) -> None:
    """Do `work`, which writes the copy; another process that is at it already is waited for."""
    while not is_finished(folder):
        try:
            work()
        except UserError as error:
            if "another process" not in str(error):
                raise
            time.sleep(1)
