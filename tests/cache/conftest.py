"""Records without a teacher, a manifest, and a way to write a cache of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache.format import coding
from distill.cache.format.folder import Manifest
from distill.cache.format.records import Documents, Record
from distill.targets import schemes
from distill.targets.hidden import HiddenTargets
from distill.targets.sparse import SparseTargets

LENGTH, VOCABULARY = 24, 1009
FINGERPRINTS = dict.fromkeys(
    ("teacher_config", "teacher_weights", "quantization", "tokenizer", "chat_template", "corpus", "packing"), "a" * 64
)


def random_record(
    seed: int, scheme: schemes.AnyScheme, length: int = LENGTH, vocabulary: int = VOCABULARY, share: float = 0.7
) -> Record:
    """A record as `scheme` could have made it: any numbers that its fields can hold, `share` of the mask True."""
    generator = np.random.default_rng(seed)
    ids_L = generator.integers(vocabulary, size=length, dtype=np.uint32)
    breaks_L = generator.random(length) < 0.2
    breaks_L[0] = True
    starts_L = np.maximum.accumulate(np.where(breaks_L, np.arange(length), 0))
    mask_L = generator.random(length) < share
    mask_L[-1] = False
    positions = int(mask_L.sum())
    entropy_N, surprisal_N = generator.integers(2**16, size=(2, positions), dtype=np.uint16)
    targets = random_targets(generator, scheme, ids_L, mask_L, vocabulary)
    documents = None
    if seed % 4:  # others are of samples that no corpus made
        hashes = generator.integers(2**64, size=int(breaks_L.sum()), dtype=np.uint64)
        documents = Documents(hashes, generator.integers(300, size=len(hashes), dtype=np.uint32))
    positions_L = (np.arange(length) - starts_L).astype(np.uint32)
    return Record(ids_L, positions_L, mask_L, targets, entropy_N, surprisal_N, documents)


def random_targets(
    generator: np.random.Generator, scheme: Any, ids_L: np.ndarray, mask_L: np.ndarray, vocabulary: int
) -> SparseTargets | HiddenTargets:
    positions = int(mask_L.sum())
    if isinstance(scheme, schemes.Hidden):
        bits_ND = generator.integers(-(2**15), 2**15, size=(positions, scheme.size), dtype=np.int16)
        return HiddenTargets(torch.from_numpy(bits_ND).view(torch.bfloat16))
    atoms_N = np.zeros(positions, dtype=np.int64)
    if isinstance(scheme, schemes.VarOpt):
        exact_N = generator.integers(1, 2 + int(0.5 / scheme.threshold), size=positions)
        atoms_N = generator.integers(0, 2 + int(0.5 / scheme.threshold), size=positions)
    elif isinstance(scheme, schemes.TopK):
        exact_N = np.full(positions, min(scheme.entries, vocabulary))
    else:
        exact_N = generator.integers(1, scheme.entries + 1, size=positions)
    rows = [np.empty(0, np.int64)]
    for place, exact, atoms in zip(np.flatnonzero(mask_L), exact_N, atoms_N, strict=True):
        ids = generator.permutation(min(vocabulary, 4096))[: exact + atoms]
        if generator.random() < 0.5 and ids_L[place + 1] not in ids:
            ids[generator.integers(exact)] = ids_L[place + 1]  # the true next token is among the exact entries
        rows += [ids[:exact], np.sort(ids[exact:])]
    stored_N = atoms_N
    if isinstance(scheme, schemes.TopK):
        stored_N = generator.integers(0, 2, size=positions)  # 1 where the bucket takes the rest
    codes = int(coding.coded_mask(scheme, exact_N, stored_N, int((exact_N + stored_N).max(initial=0)) + 1).sum())
    codes_C = generator.integers(0, 2048, size=codes, dtype=np.uint16)
    weights_T, rest_N = coding.decode(scheme, codes_C, exact_N, stored_N)
    return SparseTargets(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(weights_T),
        torch.from_numpy(exact_N),
        torch.from_numpy(exact_N + atoms_N),
        None if rest_N is None else torch.from_numpy(rest_N),
    )


class Tokenizer:
    """Writes two files, as a tokenizer does."""

    def save_pretrained(self, folder: Path, /) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"model": "BPE"}')
        (folder / "tokenizer_config.json").write_text('{\n  "is_local": true,\n  "model_max_length": 12\n}\n')


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Record, Record], None]:
    """`assert_same(one, other)`: equal numbers of equal types."""

    def compare(one: Record, other: Record) -> None:
        assert type(one.targets) is type(other.targets)
        assert (one.documents is None) == (other.documents is None)
        ours, theirs = (
            {**vars(record), **vars(record.targets), **(vars(record.documents) if record.documents else {})}
            for record in (one, other)
        )
        for field, value in ours.items():
            if isinstance(value, Tensor):
                assert value.dtype == theirs[field].dtype
                bits = [v.view(torch.int16) if v.dtype == torch.bfloat16 else v for v in (value, theirs[field])]
                assert torch.equal(*bits), field
            elif isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, theirs[field], strict=True)

    return compare


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return the tokenizer that `save_tokenizer` is given."""
    return Tokenizer()


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """`contents(folder)`: every file below a folder."""

    def look(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return look


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return random_record


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """`make_manifest(samples=25)`: of a cache of 24 tokens a sample, of which the first five are held out."""

    def make(samples: int = 25, shard_samples: int = 4, **changes: Any) -> Manifest:
        content: dict[str, Any] = {
            "scheme": "varopt",
            "scheme_parameters": {"threshold": 0.05},
            "temperature": 1.0,
            "seed": 0,
            "vocab_size": VOCABULARY,
            "sequence_length": LENGTH,
            "pack": True,
            "shard_samples": shard_samples,
            "splits": {"held_out": 5, "train": samples - 5},
            "fingerprints": FINGERPRINTS,
            "made_with": {"torch": "2"},
        }
        return Manifest(**{**content, **changes})

    return make


@pytest.fixture(scope="session")
def records_of() -> Callable[[Manifest, int], list[Record]]:
    """`records_of(manifest, shard)`: the shard's records, always the same; every third one carries no loss."""

    def records(manifest: Manifest, shard: int) -> list[Record]:
        scheme = manifest.make_scheme()
        return [
            random_record(sample, scheme, share=0 if sample % 3 == 2 else 0.6) for sample in manifest.shard_range(shard)
        ]

    return records
