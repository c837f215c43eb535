"""Reading a cache: sample i in constant time, memory-mapped, and batches of samples with their targets.

Shapes: B batch, L sequence length, N positions with loss in the batch, K entries of a target (padded).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from distill.cache.format import read_journal, read_manifest, shard_file
from distill.cache.records import DamagedRecord, Record, unpack
from distill.errors import UserError
from distill.targets.sparse import SparseTargets
from distill.targets.stored import SCALAR_STEP


@dataclass(frozen=True)
class Batch:
    """Samples with the teacher's targets at their positions with loss, row after row."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    loss_mask_BL: Tensor
    targets: SparseTargets
    entropy_N: Tensor
    """The teacher's entropy in nats."""
    surprisal_N: Tensor
    """The teacher's negative log-probability of the true next token in nats."""

    def to(self, device: torch.device) -> Batch:
        """The batch on another device (Lightning calls this)."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids_BL", "position_ids_BL", "loss_mask_BL")}
        targets = SparseTargets(*(tensor.to(device) for tensor in vars(self.targets).values()))
        return Batch(
            **moved, targets=targets, entropy_N=self.entropy_N.to(device), surprisal_N=self.surprisal_N.to(device)
        )


class CacheReader(Dataset[Record]):
    """The samples of one split (`train` or `held_out`) of a finished cache.

    Raises UserError when the folder is no cache, is not finished, or a sample in it is damaged.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.scheme = self.manifest.make_scheme()
        self.start, self.stop = self.manifest.splits[split]
        missing = self.manifest.shards - len(read_journal(folder))
        if missing:
            raise UserError(
                f"cache {folder} is not finished ({missing} of {self.manifest.shards} shards to go): "
                "run `distill cache-teacher` again, it continues"
            )
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, row = divmod(self.start + index, self.manifest.shard_samples)
        try:
            return unpack(self._bytes(shard, row), self.manifest.sequence_length, self.scheme)
        except (DamagedRecord, SafetensorError, OSError) as error:
            raise UserError(
                f"cache {self.folder}: {shard_file(shard)}, sample {row} cannot be read ({error}): "
                f"run `distill inspect {self.folder} --verify`"
            ) from None

    def _bytes(self, shard: int, row: int) -> bytes:
        if shard not in self._shards:
            self._shards[shard] = safe_open(self.folder / shard_file(shard), framework="np")
        file = self._shards[shard]
        start, stop = (int(offset) for offset in file.get_slice("offsets")[row : row + 2])
        return file.get_slice("records")[start:stop].tobytes()

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open the shards themselves."""
        return {**self.__dict__, "_shards": {}}

    def collate(self, records: list[Record]) -> Batch:
        """Records to one batch; targets are padded to the longest of them."""
        stored = [record.targets for record in records]
        heads_N = np.concatenate([targets.heads_N for targets in stored]).astype(np.int64)
        atoms_N = np.concatenate([targets.atoms_N for targets in stored]).astype(np.int64)
        counts_N = heads_N + atoms_N
        weights_NK = self.scheme.decode(np.concatenate([targets.codes_C for targets in stored]), heads_N, atoms_N)
        ids_NK = np.zeros(weights_NK.shape, dtype=np.int64)
        is_entry_NK = np.arange(weights_NK.shape[1]) < counts_N[:, None]
        ids_NK[is_entry_NK] = np.concatenate([targets.ids_T for targets in stored])
        return Batch(
            input_ids_BL=_stack([record.input_ids_L for record in records]),
            position_ids_BL=_stack([record.position_ids_L for record in records]),
            loss_mask_BL=_stack([record.loss_mask_L for record in records]).bool(),
            targets=SparseTargets(
                torch.from_numpy(ids_NK),
                torch.from_numpy(weights_NK).float(),
                torch.from_numpy(heads_N),
                torch.from_numpy(counts_N),
            ),
            entropy_N=_nats([targets.entropy_N for targets in stored]),
            surprisal_N=_nats([targets.surprisal_N for targets in stored]),
        )


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _nats(steps: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(steps).astype(np.float32) * np.float32(SCALAR_STEP))
