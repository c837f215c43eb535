"""Reading a cache: sample i in constant time, memory-mapped, and batches of samples with their targets.

Shapes: B batch, L sequence length, N positions with loss in the batch, K entries of a target (padded).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from distill.cache.batches import Batch, collate
from distill.cache.format import read_journal, read_manifest, shard_file
from distill.cache.records import DamagedRecord, Record, unpack
from distill.errors import UserError


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
        return collate(records, self.scheme)
