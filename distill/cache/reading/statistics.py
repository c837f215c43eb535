"""Statistics of a cache's samples: bytes by field, entropy, exact mass, entries; and the alternatives of one sample."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.cache.format.records import encode_fields
from distill.cache.reading.batches import collate
from distill.cache.reading.reader import CacheReader
from distill.targets.schemes import TopK, VarOpt
from distill.targets.sparse import SparseTargets


@dataclass(frozen=True)
class Statistics:
    """Means over the positions with loss of some samples, spread evenly over a split."""

    samples: int
    tokens: int
    positions: int
    bytes_by_field: dict[str, int]
    entropy: float
    """The teacher's entropy, in nats."""
    surprisal: float
    """The teacher's mean negative log-probability of the true next token, in nats."""
    exact_mass: float | None
    """Mass that is kept exactly. None if all of it is (hidden states), or none (random draws)."""
    entries: dict[int, int]
    """Positions by their number of entries; empty for hidden states."""


def gather(reader: CacheReader, most_samples: int = 256) -> Statistics:
    """Compute statistics of at most `most_samples` samples."""
    count = min(len(reader), most_samples)
    chosen = np.linspace(0, len(reader) - 1, count).round().astype(int) if count else []
    sizes: Counter[str] = Counter()
    entries: Counter[int] = Counter()
    tokens = positions = 0
    entropy = surprisal = exact_mass = 0.0
    for index in chosen:
        record = reader[int(index)]
        sizes.update(
            {name: len(field) for name, field in encode_fields(reader.order.ranked(record), reader.scheme).items()}
        )
        batch = collate([record])
        tokens += len(record.input_ids_L)
        positions += len(batch.entropy_N)
        entropy, surprisal = entropy + float(batch.entropy_N.sum()), surprisal + float(batch.surprisal_N.sum())
        if isinstance(batch.targets, SparseTargets):
            entries.update(batch.targets.counts_N.tolist())
            exact_mass += float(batch.targets.weights_T[batch.targets.exact_mask()].sum())
    is_exact = isinstance(reader.scheme, (VarOpt, TopK))
    n = max(positions, 1)
    return Statistics(
        samples=count,
        tokens=tokens,
        positions=positions,
        bytes_by_field=dict(sizes),
        entropy=entropy / n,
        surprisal=surprisal / n,
        exact_mass=exact_mass / n if is_exact else None,
        entries=dict(sorted(entries.items())),
    )


def histogram(entries: dict[int, int], bins: int = 8) -> list[tuple[str, float]]:
    """Return shares of the positions by number of entries, in at most `bins` ranges of equal width."""
    if not entries:
        return []
    low, high = min(entries), max(entries)
    width = -(-(high - low + 1) // bins)
    total = sum(entries.values())
    rows = []
    for start in range(low, high + 1, width):
        stop = min(start + width - 1, high)
        share = sum(count for number, count in entries.items() if start <= number <= stop) / total
        rows.append((f"{start}-{stop}" if stop > start else f"{start}", share))
    return rows


def alternatives(reader: CacheReader, index: int, tokenizer: Any, most: int = 4) -> list[str]:
    """Return a line for each token of a sample: the token, its probability, and the teacher's likeliest tokens.

    `p` is the teacher's probability of the token, `H` its entropy in nats; then come its most probable tokens with
    their weights. A token without numbers carries no loss. Hidden states hold no ids, so there p and H are all.
    """
    record = reader[index]
    batch = collate([record])
    position_of = np.cumsum(record.loss_mask_L) - 1
    lines = []
    for place, token in enumerate(record.input_ids_L):
        text = f"{_shown(tokenizer, int(token)):<16}"
        if record.position_ids_L[place] and record.loss_mask_L[place - 1]:
            position = int(position_of[place - 1])
            probability = math.exp(-float(batch.surprisal_N[position]))
            text += f"  p {probability:6.4f}  H {float(batch.entropy_N[position]):5.2f}  "
            if isinstance(batch.targets, SparseTargets):
                here = batch.targets[position : position + 1]
                pairs = zip(here.ids_T.tolist(), here.weights_T.tolist(), strict=True)
                likely = itertools.islice(pairs, min(int(here.exact_N), most))
                text += "  ".join(f"{_shown(tokenizer, token)} {weight:.2f}" for token, weight in likely)
        lines.append(text.rstrip())
    return lines


def document_lines(reader: CacheReader, index: int) -> list[str]:
    """Return a line for each document of a sample: its first token there, its hash, its source; none if not known."""
    record = reader[index]
    if record.documents is None:
        return []
    lines, names = [], reader.manifest.sources
    starts = np.flatnonzero(record.position_ids_L == 0)
    for start, value, source in zip(starts, record.documents.hashes, record.documents.sources, strict=True):
        name = names[source] if source < len(names) else f"source {source}"
        # The sha256 begins with these digits.
        text = f"document {int(value).to_bytes(8, 'little').hex()} of {name}" if value else "padding"
        lines.append(f"from token {start}: {text}")
    return lines


def _shown(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token]))
