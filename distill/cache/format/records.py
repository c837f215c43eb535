"""One sample as bytes: token ids, documents, loss mask and targets, each field packed on its own.

A record is a crc32, some sizes and its fields, as the cache's README lists them; it can be read without any other.
Shapes: L sequence length, N positions with loss, D hidden size, K entries (padded), T entries of all positions.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distill.cache.format import coding
from distill.cache.format.arrays import DamagedRecord, compress, decompress, read_sizes, write_sizes
from distill.targets.hidden import HiddenTargets
from distill.targets.schemes import AnyScheme, Hidden, SparseScheme, TopK
from distill.targets.sparse import SparseTargets


@dataclass(frozen=True)
class Documents:
    """Documents that a sample's positions come from, one for each place where its position ids begin anew."""

    hashes: NDArray[np.uint64]
    """First 8 bytes of the sha256 of each one's content, little-endian; 0 for padding."""
    sources: NDArray[np.uint32]
    """Number of each one's source in the manifest's list."""


@dataclass(frozen=True)
class Record:
    """A sample with its targets."""

    input_ids_L: NDArray[np.uint32]
    position_ids_L: NDArray[np.uint32]
    loss_mask_L: NDArray[np.bool_]
    targets: SparseTargets | HiddenTargets
    """Targets on the CPU, with weights as `coding.round_weights` or `coding.decode` made them."""
    entropy_N: NDArray[np.uint16]
    """The teacher's entropy, in steps of 1/64 nat."""
    surprisal_N: NDArray[np.uint16]
    """The teacher's negative log-probability of the true next token, in steps of 1/64 nat (at most 1,023 nats)."""
    documents: Documents | None = None
    """Documents of the positions. None if unknown: a cache of format version 1, samples that no corpus made."""

    @property
    def entries(self) -> int:
        """Entries of all positions; 0 if nothing was left out of the distributions."""
        return len(self.targets.ids_T) if isinstance(self.targets, SparseTargets) else 0


def encode(record: Record, scheme: AnyScheme, key: int = 0) -> bytes:
    """Return the record as bytes; its checksum starts from `key`, so that it checks with the same key alone."""
    fields = encode_fields(record, scheme)
    sizes = [len(_document_lengths(record.position_ids_L)), len(_runs(record.loss_mask_L)), *map(len, fields.values())]
    body = write_sizes(map(int, sizes)) + b"".join(fields.values())
    return struct.pack("<I", zlib.crc32(body, key)) + body


def encode_fields(record: Record, scheme: AnyScheme) -> dict[str, bytes]:
    """Return the fields of the record by name, in their order."""
    arrays: list[NDArray] = [_document_lengths(record.position_ids_L), _runs(record.loss_mask_L)]
    if isinstance(scheme, Hidden):
        assert isinstance(record.targets, HiddenTargets)
        arrays += [record.input_ids_L, record.entropy_N, record.surprisal_N]
        bits_ND = record.targets.hidden_ND.view(torch.int16).numpy()
        fields = [*map(compress, arrays), bits_ND.astype("<i2").tobytes()]
    else:
        assert isinstance(record.targets, SparseTargets)
        arrays += [*_target_fields(record.targets, scheme), record.entropy_N, record.surprisal_N]
        arrays += [*_token_fields(record.input_ids_L, record.loss_mask_L, record.targets)]
        fields = [*map(compress, arrays)]
    return dict(zip(_field_names(scheme), [*fields, *_document_fields(record)], strict=True))


def decode(
    data: bytes, sequence_length: int, scheme: AnyScheme, key: int = 0, *, with_documents: bool = True
) -> Record:
    """Return the record that `encode` wrote. Raises DamagedRecord if a bit has changed, or the key is another.

    `with_documents`: False for format version 1, whose records lack the last two fields.
    """
    if len(data) < 4 or zlib.crc32(memoryview(data)[4:], key) != struct.unpack_from("<I", data)[0]:
        raise DamagedRecord("its checksum does not match")
    try:
        return _read(data, sequence_length, scheme, with_documents)
    except (IndexError, ValueError, OverflowError) as error:  # numbers that no writer wrote, though they check
        raise DamagedRecord(f"its numbers do not fit: {error}") from None


def _read(data: bytes, sequence_length: int, scheme: AnyScheme, with_documents: bool) -> Record:
    fields_written = len(_field_names(scheme)) - (0 if with_documents else 2)
    (documents, runs, *lengths), start = read_sizes(data, 4, 2 + fields_written)
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
    positions = int(loss_mask_L.sum())
    if isinstance(scheme, Hidden):
        input_ids_L = decompress(next(fields), sequence_length, "u32")
        entropy_N, surprisal_N = (decompress(next(fields), positions, "u16") for _ in range(2))
        targets: SparseTargets | HiddenTargets = _read_hidden(next(fields), positions, scheme)
    else:
        targets = _read_targets(fields, positions, scheme)
        entropy_N, surprisal_N = (decompress(next(fields), positions, "u16") for _ in range(2))
        input_ids_L = _read_tokens(fields, loss_mask_L, targets)
    from_documents = _read_documents(fields, documents) if with_documents else None
    return Record(input_ids_L, position_ids_L, loss_mask_L, targets, entropy_N, surprisal_N, from_documents)


def _field_names(scheme: AnyScheme) -> list[str]:
    common, last = ["document lengths", "loss mask"], ["document hashes", "document sources"]
    if isinstance(scheme, Hidden):
        return [*common, "token ids", "entropy", "surprisal", "hidden states", *last]
    ids = ["first exact id", "other exact ids", "first atom's id", "other atoms' ids"]
    codes = ["first exact code", "other exact codes", "atoms' code"]
    targets = ["exact entries", "atoms", *ids, *codes, "entropy", "surprisal", "next token's rank", "token ids"]
    return [*common, *targets, *last]


def _document_fields(record: Record) -> tuple[bytes, bytes]:
    """Return hashes unpacked, since nothing makes them shorter, and sources in LEB128; empty if unknown."""
    if record.documents is None:
        return b"", b""
    assert len(record.documents.hashes) == len(_document_lengths(record.position_ids_L))
    return record.documents.hashes.astype("<u8").tobytes(), write_sizes(record.documents.sources.tolist())


def _read_documents(fields: Iterator[bytes], count: int) -> Documents | None:
    hashes, sources = next(fields), next(fields)
    if not hashes and not sources:
        return None
    numbers, end = read_sizes(sources, 0, count)
    if len(hashes) != 8 * count or end != len(sources) or max(numbers, default=0) >= 2**32:
        raise DamagedRecord("its documents do not fit")
    return Documents(np.frombuffer(hashes, dtype="<u8").astype(np.uint64), np.array(numbers, dtype=np.uint32))


class Tokens(Protocol):
    """A sample's tokens, whatever else it has."""

    @property
    def input_ids_L(self) -> NDArray: ...
    @property
    def position_ids_L(self) -> NDArray: ...
    @property
    def loss_mask_L(self) -> NDArray: ...


def token_hash(samples: Iterable[Tokens]) -> str:
    """Return the sha256 of samples' token ids, position ids (u32, little-endian) and loss masks (bytes 0 and 1)."""
    digest = hashlib.sha256()
    for sample in samples:
        for column in (sample.input_ids_L.astype("<u4"), sample.position_ids_L.astype("<u4"), sample.loss_mask_L):
            digest.update(column.tobytes())
    return digest.hexdigest()


def _read_hidden(data: bytes, positions: int, scheme: Hidden) -> HiddenTargets:
    bits = np.frombuffer(data, dtype="<i2").astype(np.int16)
    if len(bits) != positions * scheme.size:
        raise DamagedRecord("its states do not fit the positions")
    return HiddenTargets(torch.from_numpy(bits.reshape(positions, scheme.size)).view(torch.bfloat16))


def _document_lengths(position_ids_L: NDArray) -> NDArray[np.uint32]:
    starts = np.flatnonzero(position_ids_L == 0)
    return np.diff(np.append(starts, len(position_ids_L))).astype(np.uint32)


def _runs(mask_L: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Return the lengths of the runs of equal values, the first run being False (perhaps of length 0)."""
    changes = np.flatnonzero(np.diff(mask_L.astype(np.int8), prepend=0))
    return np.diff(np.concatenate([[0], changes, [len(mask_L)]])).astype(np.uint32)


# Tokens. At a position with loss the next token is most often one of the exact entries there: then its rank says which.


def _token_fields(
    input_ids_L: NDArray[np.uint32], loss_mask_L: NDArray[np.bool_], targets: SparseTargets
) -> Iterator[NDArray]:
    """Yield the true next token's rank among each position's exact entries (their number: not there), other tokens."""
    exact_N = targets.exact_N.numpy()
    ids_NK = targets.padded()[0].numpy()
    next_L = np.flatnonzero(loss_mask_L) + 1
    is_exact_NK = np.arange(ids_NK.shape[1]) < exact_N[:, None]
    found_NK = is_exact_NK & (ids_NK == input_ids_L[next_L][:, None])
    rank_N = np.where(found_NK.any(axis=1), found_NK.argmax(axis=1) if found_NK.size else 0, exact_N)
    # A token that is an exact entry of the position before it is not stored: its rank there is enough.
    told_L = np.ones(len(input_ids_L), dtype=bool)
    told_L[next_L[rank_N < exact_N]] = False
    yield rank_N.astype(np.uint16)
    yield input_ids_L[told_L].astype(np.uint32)


def _read_tokens(fields: Iterator[bytes], loss_mask_L: NDArray[np.bool_], targets: SparseTargets) -> NDArray[np.uint32]:
    exact_N, counts_N = targets.exact_N.numpy(), targets.counts_N.numpy()
    rank_N = decompress(next(fields), len(exact_N), "u16").astype(np.int64)
    known_N = rank_N < exact_N
    first_entry_N = np.cumsum(counts_N) - counts_N
    input_ids_L = np.empty(len(loss_mask_L), dtype=np.uint32)
    told_L = np.ones(len(loss_mask_L), dtype=bool)
    known_L = (np.flatnonzero(loss_mask_L) + 1)[known_N]
    told_L[known_L] = False
    input_ids_L[known_L] = targets.ids_T.numpy()[(first_entry_N + rank_N)[known_N]]
    input_ids_L[told_L] = decompress(next(fields), int(told_L.sum()), "u32")
    return input_ids_L


# Targets.


def _target_fields(targets: SparseTargets, scheme: SparseScheme) -> Iterator[NDArray]:
    exact_N, counts_N = targets.exact_N.numpy(), targets.counts_N.numpy()
    atoms_N = coding.stored_atoms(scheme, targets)
    yield exact_N.astype(np.uint16)
    yield atoms_N.astype(np.uint16)
    ids_NK = targets.padded()[0].numpy()
    # Atoms stand in order of rising id: their distances are smaller numbers than their ids.
    first_atom_NK = np.arange(ids_NK.shape[1]) == exact_N[:, None]
    steps_NK = ids_NK - np.where(first_atom_NK, 0, np.roll(ids_NK, 1, axis=1))
    masks = _id_masks(exact_N, counts_N)
    for mask_NK, values_NK in zip(masks, (ids_NK, ids_NK, steps_NK, steps_NK), strict=True):
        yield values_NK[mask_NK].astype(np.uint32)

    coded_NK, first_NK, atom_NK = _code_masks(exact_N, atoms_N, scheme)
    codes_NK = np.zeros(coded_NK.shape, dtype=np.int64)
    codes_NK[coded_NK] = coding.encode(scheme, targets)
    # Exact codes are in the order of their weights: a code is stored as its distance from the one before.
    differences_NK = codes_NK - np.roll(codes_NK, 1, axis=1)
    yield codes_NK[first_NK].astype(np.int32)
    yield differences_NK[coded_NK & ~first_NK & ~atom_NK].astype(np.int32)
    yield codes_NK[atom_NK].astype(np.int32)


def _read_targets(fields: Iterator[bytes], positions: int, scheme: SparseScheme) -> SparseTargets:
    exact_N, atoms_N = (decompress(next(fields), positions, "u16").astype(np.int64) for _ in range(2))
    counts_N = exact_N if isinstance(scheme, TopK) else exact_N + atoms_N
    if counts_N.max(initial=0) > scheme.most_entries:
        raise DamagedRecord("a position has more entries than its scheme makes")
    if isinstance(scheme, TopK) and atoms_N.max(initial=0) > 1:
        raise DamagedRecord("a position has atoms, which its scheme does not make")
    place_K = np.arange(int(counts_N.max(initial=0)))
    entries_NK, is_exact_NK = place_K < counts_N[:, None], place_K < exact_N[:, None]
    ids_NK = np.zeros(entries_NK.shape, dtype=np.int64)
    for mask_NK in _id_masks(exact_N, counts_N):
        ids_NK[mask_NK] = decompress(next(fields), int(mask_NK.sum()), "u32")
    # Exact ids are stored whole. Atoms' ids are sums of the distances up to them.
    ids_NK = np.where(is_exact_NK, ids_NK, np.where(is_exact_NK, 0, ids_NK).cumsum(axis=1))

    coded_NK, first_NK, atom_NK = _code_masks(exact_N, atoms_N, scheme)
    codes_NK = np.zeros(coded_NK.shape, dtype=np.int64)
    for mask_NK in (first_NK, coded_NK & ~first_NK & ~atom_NK):
        codes_NK[mask_NK] = decompress(next(fields), int(mask_NK.sum()), "i32")
    codes_NK = np.where(coded_NK & ~atom_NK, codes_NK.cumsum(axis=1), 0)
    codes_NK[atom_NK] = decompress(next(fields), int(atom_NK.sum()), "i32")
    if codes_NK.min(initial=0) < 0:
        raise DamagedRecord("a weight's code is below 0")
    weights_T, rest_N = coding.decode(scheme, codes_NK[coded_NK], exact_N, atoms_N)
    return SparseTargets(
        torch.from_numpy(ids_NK[entries_NK]),
        torch.from_numpy(weights_T),
        torch.from_numpy(exact_N),
        torch.from_numpy(counts_N),
        None if rest_N is None else torch.from_numpy(rest_N),
    )


def _id_masks(exact_N: NDArray, counts_N: NDArray) -> list[NDArray]:
    """Return masks `[N, K]` of first exact, other exact, first atoms, other atoms: ids of each kind are alike."""
    place_NK = np.arange(int(counts_N.max(initial=0)))[None, :]
    entries_NK, is_exact_NK = place_NK < counts_N[:, None], place_NK < exact_N[:, None]
    first_exact_NK = is_exact_NK & (place_NK == 0)
    first_atom_NK = entries_NK & (place_NK == exact_N[:, None])
    return [
        first_exact_NK,
        is_exact_NK & ~first_exact_NK,
        first_atom_NK,
        entries_NK & ~is_exact_NK & ~first_atom_NK,
    ]


def _code_masks(exact_N: NDArray, atoms_N: NDArray, scheme: SparseScheme) -> tuple[NDArray, NDArray, NDArray]:
    """Return places with a code, each row's first exact code, and the codes behind the exact ones (atoms, the rest)."""
    width = int((exact_N + atoms_N).max(initial=0)) + 1
    coded_NK = coding.coded_mask(scheme, exact_N, atoms_N, width)
    behind_NK = coded_NK & (np.arange(width)[None, :] >= exact_N[:, None])
    exact_code_NK = coded_NK & ~behind_NK
    first_NK = exact_code_NK & (exact_code_NK.cumsum(axis=1) == 1)
    return coded_NK, first_NK, behind_NK
