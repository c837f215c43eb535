"""One sample as bytes: token ids, documents, loss mask and targets, each field packed by pcodec on its own.

A record is `crc32 | count of fields | length of each field | fields`, numbers little-endian u32; a field is a pcodec
standalone stream. It can be read without any other record. Shapes: L sequence length, N positions with loss,
K entries (padded), T entries of all positions, C codes of all positions.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, standalone

from distill.targets.schemes import Scheme
from distill.targets.stored import StoredTargets

_CONFIG = ChunkConfig(compression_level=8)


@dataclass(frozen=True)
class Record:
    """A sample with its targets."""

    input_ids_L: NDArray[np.uint32]
    position_ids_L: NDArray[np.uint32]
    loss_mask_L: NDArray[np.bool_]
    targets: StoredTargets


class DamagedRecord(Exception):
    """The bytes are not a record: cut off, or changed after they were written."""


def pack(record: Record, scheme: Scheme) -> bytes:
    """The record as bytes."""
    fields = [standalone.simple_compress(np.ascontiguousarray(field), _CONFIG) for field in _fields(record, scheme)]
    lengths = struct.pack(f"<{1 + len(fields)}I", len(fields), *map(len, fields))
    body = lengths + b"".join(fields)
    return struct.pack("<I", zlib.crc32(body)) + body


def unpack(data: bytes, sequence_length: int, scheme: Scheme) -> Record:
    """The record that `pack` wrote. Raises DamagedRecord when a bit of it has changed."""
    if len(data) < 8 or zlib.crc32(data[4:]) != struct.unpack_from("<I", data)[0]:
        raise DamagedRecord("its checksum does not match")
    count = struct.unpack_from("<I", data, 4)[0]
    lengths = struct.unpack_from(f"<{count}I", data, 8)
    start = 8 + 4 * count
    fields: list[bytes] = []
    for length in lengths:
        fields.append(data[start : start + length])
        start += length
    stream = iter(fields)

    input_ids_L = _read(stream, sequence_length, np.uint32)
    restarts = _read(stream, 1, np.uint32)
    document_lengths = _read(stream, int(restarts[0]), np.uint32)
    runs = _read(stream, 1, np.uint32)
    mask_runs = _read(stream, int(runs[0]), np.uint32)
    loss_mask_L = np.repeat(np.arange(len(mask_runs)) % 2 == 1, mask_runs)
    position_ids_L = np.concatenate([np.arange(length, dtype=np.uint32) for length in document_lengths])
    targets = _read_targets(stream, int(loss_mask_L.sum()), scheme)
    return Record(input_ids_L, position_ids_L, loss_mask_L, targets)


def _fields(record: Record, scheme: Scheme) -> Iterator[NDArray]:
    """The fields in their order; what they hold is written down in this folder's README."""
    targets = record.targets
    starts = np.flatnonzero(record.position_ids_L == 0)
    document_lengths = np.diff(np.append(starts, len(record.position_ids_L)))
    changes = np.flatnonzero(np.diff(record.loss_mask_L.astype(np.int8), prepend=0))
    mask_runs = np.diff(np.concatenate([[0], changes, [len(record.loss_mask_L)]]))
    yield record.input_ids_L
    yield np.array([len(document_lengths)], dtype=np.uint32)
    yield document_lengths.astype(np.uint32)
    yield np.array([len(mask_runs)], dtype=np.uint32)
    yield mask_runs.astype(np.uint32)
    yield targets.heads_N
    yield targets.atoms_N

    heads_N, counts_N = targets.split()
    place_NK, entries_NK, is_head_NK = _places(heads_N, counts_N)
    ids_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    ids_NK[entries_NK] = targets.ids_T
    # Atoms stand in order of rising id: their distances are smaller numbers than their ids.
    before_NK = np.where(place_NK == heads_N[:, None], 0, np.roll(ids_NK, 1, axis=1))
    atom_steps_NK = ids_NK - before_NK
    first_atom_NK = entries_NK & (place_NK == heads_N[:, None])
    yield ids_NK[is_head_NK & (place_NK == 0)].astype(np.uint32)
    yield ids_NK[is_head_NK & (place_NK > 0)].astype(np.uint32)
    yield atom_steps_NK[first_atom_NK].astype(np.uint32)
    yield atom_steps_NK[entries_NK & ~is_head_NK & ~first_atom_NK].astype(np.uint32)

    coded_NK, first_NK, atom_NK = _code_masks(heads_N, counts_N, entries_NK, scheme)
    codes_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    codes_NK[coded_NK] = targets.codes_C
    # Head codes are in the order of their weights: a code is stored as its distance from the one before.
    steps_NK = codes_NK - np.where(first_NK, 0, np.roll(codes_NK, 1, axis=1))
    yield codes_NK[first_NK].astype(np.int32)
    yield steps_NK[coded_NK & ~first_NK & ~atom_NK].astype(np.int32)
    yield codes_NK[atom_NK].astype(np.int32)
    yield targets.entropy_N
    yield targets.surprisal_N


def _read_targets(stream: Iterator[bytes], positions: int, scheme: Scheme) -> StoredTargets:
    heads = _read(stream, positions, np.uint16)
    atoms = _read(stream, positions, np.uint16)
    heads_N = heads.astype(np.int64)
    counts_N = heads_N + atoms
    place_NK, entries_NK, is_head_NK = _places(heads_N, counts_N)

    ids_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    first_atom_NK = entries_NK & (place_NK == heads_N[:, None])
    for mask_NK in (
        is_head_NK & (place_NK == 0),
        is_head_NK & (place_NK > 0),
        first_atom_NK,
        entries_NK & ~is_head_NK & ~first_atom_NK,
    ):
        ids_NK[mask_NK] = _read(stream, int(mask_NK.sum()), np.uint32)
    atom_ids_NK = np.where(is_head_NK, 0, ids_NK).cumsum(axis=1)
    ids_NK = np.where(is_head_NK, ids_NK, atom_ids_NK)

    coded_NK, first_NK, atom_NK = _code_masks(heads_N, counts_N, entries_NK, scheme)
    codes_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    for mask_NK in (first_NK, coded_NK & ~first_NK & ~atom_NK):
        codes_NK[mask_NK] = _read(stream, int(mask_NK.sum()), np.int32)
    codes_NK = np.where(coded_NK & ~atom_NK, codes_NK.cumsum(axis=1), 0)
    codes_NK[atom_NK] = _read(stream, int(atom_NK.sum()), np.int32)
    return StoredTargets(
        heads_N=heads,
        atoms_N=atoms,
        ids_T=ids_NK[entries_NK].astype(np.uint32),
        codes_C=codes_NK[coded_NK].astype(np.uint16),
        entropy_N=_read(stream, positions, np.uint16),
        surprisal_N=_read(stream, positions, np.uint16),
    )


def _places(heads_N: NDArray, counts_N: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    place_NK = np.broadcast_to(
        np.arange(int(counts_N.max(initial=0)))[None, :], (len(counts_N), counts_N.max(initial=0))
    )
    return place_NK, place_NK < counts_N[:, None], place_NK < heads_N[:, None]


def _code_masks(
    heads_N: NDArray, counts_N: NDArray, entries_NK: NDArray, scheme: Scheme
) -> tuple[NDArray, NDArray, NDArray]:
    """Places with a code, the first head code of each row, and the codes of atoms."""
    coded_NK = scheme.coded_mask(heads_N, counts_N - heads_N, entries_NK.shape[1])
    atom_NK = coded_NK & (np.arange(entries_NK.shape[1])[None, :] >= heads_N[:, None])
    head_code_NK = coded_NK & ~atom_NK
    first_NK = head_code_NK & (head_code_NK.cumsum(axis=1) == 1)
    return coded_NK, first_NK, atom_NK


def _read(stream: Iterator[bytes], count: int, dtype: type[np.generic]) -> NDArray:
    """The next field, which must hold `count` numbers: no size is taken from the stream itself."""
    values = np.empty(count, dtype=dtype)
    progress = standalone.simple_decompress_into(next(stream), values)
    if progress.n_processed != count or not progress.finished:
        raise DamagedRecord(f"a field has {progress.n_processed} numbers where {count} were expected")
    return values
