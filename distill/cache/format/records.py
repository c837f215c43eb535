"""One sample as bytes: token ids, documents, loss mask and targets, each field packed on its own.

A record is a crc32, some sizes and its fields, as this folder's README lists them; it can be read without any other.
Shapes: L sequence length, N positions with loss, K entries (padded), T entries of all positions, C codes of all.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from distill.cache.format.packing import DamagedRecord, compress, decompress, read_sizes, write_sizes
from distill.cache.format.stored import StoredHidden, StoredTargets
from distill.targets.schemes import AnyScheme, Hidden, RandomDraws, Scheme, TopK, VarOpt


@dataclass(frozen=True)
class Record:
    """A sample with its targets."""

    input_ids_L: NDArray[np.uint32]
    position_ids_L: NDArray[np.uint32]
    loss_mask_L: NDArray[np.bool_]
    targets: StoredTargets | StoredHidden


def pack(record: Record, scheme: AnyScheme, key: int = 0) -> bytes:
    """The record as bytes; its checksum starts from `key`, so that it checks with the same key alone."""
    fields = pack_fields(record, scheme)
    sizes = [(record.position_ids_L == 0).sum(), len(_runs(record.loss_mask_L)), *map(len, fields.values())]
    body = write_sizes(map(int, sizes)) + b"".join(fields.values())
    return struct.pack("<I", zlib.crc32(body, key)) + body


def pack_fields(record: Record, scheme: AnyScheme) -> dict[str, bytes]:
    """The fields of the record by name, in their order."""
    arrays: list[NDArray] = [_document_lengths(record.position_ids_L), _runs(record.loss_mask_L)]
    if isinstance(record.targets, StoredHidden):
        arrays += [record.input_ids_L, record.targets.entropy_N, record.targets.surprisal_N]
        fields = [*map(compress, arrays), record.targets.bits_ND.astype("<u2").tobytes()]
    else:
        assert not isinstance(scheme, Hidden)
        arrays += [
            *_target_fields(record.targets, scheme),
            *_token_fields(record.input_ids_L, record.loss_mask_L, record.targets),
        ]
        fields = [*map(compress, arrays)]
    return dict(zip(_field_names(scheme), fields, strict=True))


def unpack(data: bytes, sequence_length: int, scheme: AnyScheme, key: int = 0) -> Record:
    """The record that `pack` wrote. Raises DamagedRecord when a bit of it has changed, or the key is another."""
    if len(data) < 4 or zlib.crc32(memoryview(data)[4:], key) != struct.unpack_from("<I", data)[0]:
        raise DamagedRecord("its checksum does not match")
    try:
        return _read(data, sequence_length, scheme)
    except (IndexError, ValueError, OverflowError) as error:  # numbers that no writer wrote, though they check
        raise DamagedRecord(f"its numbers do not fit: {error}") from None


def most_entries(scheme: AnyScheme | Scheme) -> int:
    """Bound of the entries of a position."""
    if isinstance(scheme, VarOpt):
        return int(1 / scheme.threshold) + 2
    return scheme.entries if isinstance(scheme, (TopK, RandomDraws)) else 0


def _read(data: bytes, sequence_length: int, scheme: AnyScheme) -> Record:
    (documents, runs, *lengths), start = read_sizes(data, 4, 2 + len(_field_names(scheme)))
    if documents > sequence_length or runs > sequence_length + 1 or start + sum(lengths) != len(data):
        raise DamagedRecord("its sizes do not fit")
    ends = start + np.cumsum([0, *lengths])
    fields = iter([data[begin:end] for begin, end in pairwise(ends)])

    document_lengths = decompress(next(fields), documents, "u32")
    mask_runs = decompress(next(fields), runs, "u32")
    if document_lengths.sum() != sequence_length or mask_runs.sum() != sequence_length:
        raise DamagedRecord("its documents do not fill the sample")
    loss_mask_L = np.repeat(np.arange(len(mask_runs)) % 2 == 1, mask_runs)
    position_ids_L = np.concatenate([np.arange(length, dtype=np.uint32) for length in document_lengths])
    if isinstance(scheme, Hidden):
        input_ids_L = decompress(next(fields), sequence_length, "u32")
        return Record(input_ids_L, position_ids_L, loss_mask_L, _read_hidden(fields, int(loss_mask_L.sum()), scheme))
    targets = _read_targets(fields, int(loss_mask_L.sum()), scheme)
    return Record(_read_tokens(fields, loss_mask_L, targets), position_ids_L, loss_mask_L, targets)


def _field_names(scheme: AnyScheme) -> list[str]:
    common = ["document lengths", "loss mask"]
    if isinstance(scheme, Hidden):
        return [*common, "token ids", "entropy", "surprisal", "hidden states"]
    ids = ["first head's id", "other heads' ids", "first atom's id", "other atoms' ids"]
    codes = ["first head's code", "other heads' codes", "atoms' code"]
    further = [f"{name}, draw {draw}" for draw in range(2, scheme.draws + 1) for name in ids[2:]]
    return [*common, "heads", "atoms", *ids, *codes, "entropy", "surprisal", *further, "next token's rank", "token ids"]


def _read_hidden(fields: Iterator[bytes], positions: int, scheme: Hidden) -> StoredHidden:
    entropy_N = decompress(next(fields), positions, "u16")
    surprisal_N = decompress(next(fields), positions, "u16")
    bits = np.frombuffer(next(fields), dtype="<u2")
    if len(bits) != positions * scheme.size:
        raise DamagedRecord("its states do not fit the positions")
    return StoredHidden(bits.reshape(positions, scheme.size), entropy_N, surprisal_N)


def _document_lengths(position_ids_L: NDArray) -> NDArray[np.uint32]:
    starts = np.flatnonzero(position_ids_L == 0)
    return np.diff(np.append(starts, len(position_ids_L))).astype(np.uint32)


def _runs(mask_L: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Lengths of the runs of equal values, the first run being False (perhaps of length 0)."""
    changes = np.flatnonzero(np.diff(mask_L.astype(np.int8), prepend=0))
    return np.diff(np.concatenate([[0], changes, [len(mask_L)]])).astype(np.uint32)


# Tokens. At a position with loss the next token is most often one of the heads there: then its rank says which.


def _token_fields(
    input_ids_L: NDArray[np.uint32], loss_mask_L: NDArray[np.bool_], targets: StoredTargets
) -> Iterator[NDArray]:
    """Rank of the true next token among the heads of each position (the number of heads: not there); other tokens."""
    heads_N, counts_N = targets.split()
    _, entries_NK, is_head_NK = _places(heads_N, counts_N)
    ids_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    ids_NK[entries_NK] = targets.ids_T
    next_L = np.flatnonzero(loss_mask_L) + 1
    found_NK = is_head_NK & (ids_NK == input_ids_L[next_L][:, None])
    rank_N = np.where(found_NK.any(axis=1), found_NK.argmax(axis=1) if found_NK.size else 0, heads_N)
    told_L = np.ones(len(input_ids_L), dtype=bool)
    told_L[next_L[rank_N < heads_N]] = False
    yield rank_N.astype(np.uint16)
    yield input_ids_L[told_L].astype(np.uint32)


def _read_tokens(fields: Iterator[bytes], loss_mask_L: NDArray[np.bool_], targets: StoredTargets) -> NDArray[np.uint32]:
    heads_N, counts_N = targets.split()
    rank_N = decompress(next(fields), len(heads_N), "u16").astype(np.int64)
    known_N = rank_N < heads_N
    first_entry_N = np.cumsum(counts_N) - counts_N
    input_ids_L = np.empty(len(loss_mask_L), dtype=np.uint32)
    told_L = np.ones(len(loss_mask_L), dtype=bool)
    known_L = (np.flatnonzero(loss_mask_L) + 1)[known_N]
    told_L[known_L] = False
    input_ids_L[known_L] = targets.ids_T[(first_entry_N + rank_N)[known_N]]
    input_ids_L[told_L] = decompress(next(fields), int(told_L.sum()), "u32")
    return input_ids_L


# Targets.


def _target_fields(targets: StoredTargets, scheme: Scheme) -> Iterator[NDArray]:
    yield targets.heads_N
    yield targets.atoms_N
    heads_N, counts_N = targets.split()
    place_NK, entries_NK, is_head_NK = _places(heads_N, counts_N)
    ids_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    ids_NK[entries_NK] = targets.ids_T
    # Atoms stand in order of rising id: their distances are smaller numbers than their ids.
    steps_NK = ids_NK - np.where(place_NK == heads_N[:, None], 0, np.roll(ids_NK, 1, axis=1))
    masks = _id_masks(place_NK, heads_N, entries_NK, is_head_NK)
    for mask_NK, values_NK in zip(masks, (ids_NK, ids_NK, steps_NK, steps_NK), strict=True):
        yield values_NK[mask_NK].astype(np.uint32)

    coded_NK, first_NK, atom_NK = _code_masks(heads_N, counts_N, scheme)
    codes_NK = np.zeros(coded_NK.shape, dtype=np.int64)
    codes_NK[coded_NK] = targets.codes_C
    # Head codes are in the order of their weights: a code is stored as its distance from the one before.
    differences_NK = codes_NK - np.roll(codes_NK, 1, axis=1)
    yield codes_NK[first_NK].astype(np.int32)
    yield differences_NK[coded_NK & ~first_NK & ~atom_NK].astype(np.int32)
    yield codes_NK[atom_NK].astype(np.int32)
    yield targets.entropy_N
    yield targets.surprisal_N
    for draw in range(1, scheme.draws):
        ids_NK[entries_NK] = targets.draw(draw)
        steps_NK = ids_NK - np.where(place_NK == heads_N[:, None], 0, np.roll(ids_NK, 1, axis=1))
        for mask_NK in masks[2:]:
            yield steps_NK[mask_NK].astype(np.uint32)


def _read_targets(fields: Iterator[bytes], positions: int, scheme: Scheme) -> StoredTargets:
    heads = decompress(next(fields), positions, "u16")
    atoms = decompress(next(fields), positions, "u16")
    heads_N = heads.astype(np.int64)
    counts_N = heads_N + atoms
    if counts_N.max(initial=0) > most_entries(scheme):
        raise DamagedRecord("a position has more entries than its scheme makes")
    place_NK, entries_NK, is_head_NK = _places(heads_N, counts_N)
    ids_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    masks = _id_masks(place_NK, heads_N, entries_NK, is_head_NK)
    for mask_NK in masks:
        ids_NK[mask_NK] = decompress(next(fields), int(mask_NK.sum()), "u32")
    ids_NK = np.where(is_head_NK, ids_NK, np.where(is_head_NK, 0, ids_NK).cumsum(axis=1))

    coded_NK, first_NK, atom_NK = _code_masks(heads_N, counts_N, scheme)
    codes_NK = np.zeros(coded_NK.shape, dtype=np.int64)
    for mask_NK in (first_NK, coded_NK & ~first_NK & ~atom_NK):
        codes_NK[mask_NK] = decompress(next(fields), int(mask_NK.sum()), "i32")
    codes_NK = np.where(coded_NK & ~atom_NK, codes_NK.cumsum(axis=1), 0)
    codes_NK[atom_NK] = decompress(next(fields), int(atom_NK.sum()), "i32")
    entropy_N, surprisal_N = (decompress(next(fields), positions, "u16") for _ in range(2))
    is_atom_NK = entries_NK & ~is_head_NK
    further = []
    for _ in range(1, scheme.draws):
        steps_NK = np.zeros(entries_NK.shape, dtype=np.int64)
        for mask_NK in masks[2:]:
            steps_NK[mask_NK] = decompress(next(fields), int(mask_NK.sum()), "u32")
        further.append(steps_NK.cumsum(axis=1)[is_atom_NK])
    return StoredTargets(
        heads_N=heads,
        atoms_N=atoms,
        ids_T=ids_NK[entries_NK].astype(np.uint32),
        codes_C=codes_NK[coded_NK].astype(np.uint16),
        entropy_N=entropy_N,
        surprisal_N=surprisal_N,
        further_DA=np.array(further, dtype=np.uint32).reshape(scheme.draws - 1, int(is_atom_NK.sum())),
    )


def _places(heads_N: NDArray, counts_N: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Of `[N, K]`: the place in the row, whether there is an entry, whether it is a head."""
    width = int(counts_N.max(initial=0))
    place_NK = np.broadcast_to(np.arange(width)[None, :], (len(counts_N), width))
    return place_NK, place_NK < counts_N[:, None], place_NK < heads_N[:, None]


def _id_masks(place_NK: NDArray, heads_N: NDArray, entries_NK: NDArray, is_head_NK: NDArray) -> list[NDArray]:
    """First heads, other heads, first atoms, other atoms: ids of each kind are alike."""
    first_atom_NK = entries_NK & (place_NK == heads_N[:, None])
    first_head_NK = is_head_NK & (place_NK == 0)
    return [
        first_head_NK,
        is_head_NK & ~first_head_NK,
        first_atom_NK,
        entries_NK & ~is_head_NK & ~first_atom_NK,
    ]


def _code_masks(heads_N: NDArray, counts_N: NDArray, scheme: Scheme) -> tuple[NDArray, NDArray, NDArray]:
    """Places with a code, the first head code of each row, and the codes behind the heads (atoms, the rest)."""
    width = int(counts_N.max(initial=0)) + 1
    coded_NK = scheme.coded_mask(heads_N, counts_N - heads_N, width)
    behind_NK = coded_NK & (np.arange(width)[None, :] >= heads_N[:, None])
    head_code_NK = coded_NK & ~behind_NK
    first_NK = head_code_NK & (head_code_NK.cumsum(axis=1) == 1)
    return coded_NK, first_NK, behind_NK
