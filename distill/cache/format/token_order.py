"""The order of the tokens in which records write their ids: frequent ones first, so that ids are small numbers.

It is a function of the corpus alone, made once, and lies beside the shards; its hash is a fingerprint of the manifest.
Shapes: V vocabulary, N positions with loss, T entries of all positions, A atoms of all positions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distill.cache.format.arrays import DamagedRecord, compress, decompress, read_sizes, write_sizes
from distill.cache.format.folder import TOKEN_ORDER
from distill.cache.format.manifest import Manifest
from distill.cache.format.records import Record
from distill.errors import UserError
from distill.system.files import read_bounded, write_durably
from distill.system.locks import cannot_write
from distill.targets.next_token import next_ids
from distill.targets.sparse import SparseTargets

FINGERPRINT = "token_order"
"""Name among the manifest's fingerprints. Without it, tokens are in the order of their ids."""

_TOKENS = 2**20
"""Tokens that are counted: enough to tell frequent tokens from rare ones."""


@dataclass(frozen=True)
class TokenOrder:
    """A permutation of the vocabulary."""

    tokens_V: NDArray[np.uint32]
    """The token of each rank."""

    @cached_property
    def ranks_V(self) -> NDArray[np.int64]:
        """The rank of each token."""
        ranks_V = np.empty(len(self.tokens_V), dtype=np.int64)
        ranks_V[self.tokens_V] = np.arange(len(self.tokens_V))
        return ranks_V

    @classmethod
    def by_frequency(cls, counts_V: NDArray[np.integer]) -> TokenOrder:
        """Put frequent tokens first; equally frequent ones by id, which in most vocabularies follows frequency."""
        return cls(np.argsort(-counts_V.astype(np.int64), kind="stable").astype(np.uint32))

    @classmethod
    def by_id(cls, vocab_size: int) -> TokenOrder:
        """Put the tokens in the order of their ids."""
        return cls(np.arange(vocab_size, dtype=np.uint32))

    @cached_property
    def is_by_id(self) -> bool:
        """True if ranks are ids."""
        return bool((np.diff(self.tokens_V.astype(np.int64)) > 0).all())

    def ranked(self, record: Record) -> Record:
        """Return the record with ranks in the place of token ids, as it is written."""
        return self._relabelled(record, self.ranks_V)

    def named(self, record: Record) -> Record:
        """Return the record with token ids in the place of ranks. Raises DamagedRecord for an impossible rank."""
        return self._relabelled(record, self.tokens_V)

    def _relabelled(self, record: Record, names_V: NDArray) -> Record:
        is_sparse = isinstance(record.targets, SparseTargets)
        numbers = [record.input_ids_L, *([record.targets.ids_T.numpy()] if is_sparse else [])]  # type: ignore[union-attr]
        if any(ids.max(initial=0) >= len(names_V) for ids in numbers):
            raise DamagedRecord("a token beyond the vocabulary")
        if self.is_by_id:
            return record
        record = replace(record, input_ids_L=names_V[record.input_ids_L].astype(np.uint32))
        if not isinstance(record.targets, SparseTargets):
            return record
        ids_T = torch.from_numpy(names_V[record.targets.ids_T.numpy()].astype(np.int64))
        return replace(record, targets=_in_order(replace(record.targets, ids_T=ids_T)))

    def to_bytes(self) -> bytes:
        """Return the file: how many tokens are out of the order of their ids, and these tokens, compressed."""
        # After the last rank that is out of order, the remaining tokens follow by id.
        falls = np.flatnonzero(np.diff(self.tokens_V.astype(np.int64)) < 0)
        listed = int(falls[-1]) + 1 if len(falls) else 0
        return write_sizes([listed]) + compress(self.tokens_V[:listed])

    @classmethod
    def from_bytes(cls, data: bytes, vocab_size: int) -> TokenOrder:
        """Read the order. Raises DamagedRecord if this is no permutation of the vocabulary."""
        (listed,), start = read_sizes(data, 0, 1)
        if listed > vocab_size:
            raise DamagedRecord("more tokens than the vocabulary has")
        first = decompress(data[start:], listed, "u32")
        is_left_V = np.ones(vocab_size, dtype=bool)
        if (first >= vocab_size).any() or len(np.unique(first)) != listed:
            raise DamagedRecord("tokens twice, or beyond the vocabulary")
        is_left_V[first] = False
        return cls(np.concatenate([first, np.flatnonzero(is_left_V).astype(np.uint32)]))

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def token_counts(samples: Dataset[dict[str, Tensor]], count: int, vocab_size: int) -> NDArray[np.int64]:
    """Count how often each token is to be learned in the first samples, at most `count` and about a million tokens."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for index in range(count):
        sample = samples[index]
        counts_V += np.bincount(next_ids(sample["input_ids"], sample["loss_mask"]).numpy(), minlength=vocab_size)
        if index * len(sample["input_ids"]) >= _TOKENS:
            break
    return counts_V


def _in_order(targets: SparseTargets) -> SparseTargets:
    """Put the atoms of each position in order of rising number; they all have one weight."""
    is_atom_T = ~targets.exact_mask().numpy()
    position_A = np.arange(len(targets.counts_N)).repeat(targets.counts_N.numpy())[is_atom_T]
    ids_T = targets.ids_T.numpy().copy()
    ids_A = ids_T[is_atom_T]
    ids_T[is_atom_T] = ids_A[np.lexsort((ids_A, position_A))]
    return replace(targets, ids_T=torch.from_numpy(ids_T))


def save_order(folder: Path, order: TokenOrder) -> None:
    """Write the order beside the shards, unless a whole one is there.

    Raises UserError if it cannot be written.
    """
    path, content = folder / TOKEN_ORDER, order.to_bytes()
    try:
        if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
            write_durably(path, content)
    except OSError as error:
        raise cannot_write(folder, error, len(content)) from None


def load_order(folder: Path, manifest: Manifest) -> TokenOrder:
    """Load the order of a cache. Raises UserError if it is missing or has changed."""
    expected = manifest.fingerprints.get(FINGERPRINT)
    if expected is None:
        return TokenOrder.by_id(manifest.vocab_size)
    path = folder / TOKEN_ORDER
    again = "run `distill cache-teacher` again, it writes it anew"
    try:
        content = read_bounded(path, 64 + 8 * manifest.vocab_size)
        if hashlib.sha256(content).hexdigest() != expected:
            raise DamagedRecord("its hash does not match")
        return TokenOrder.from_bytes(content, manifest.vocab_size)
    except FileNotFoundError:
        raise UserError(f"{path}: missing: {again}") from None
    except (DamagedRecord, OSError) as error:
        raise UserError(f"{path}: has changed ({error}): {again}") from None
