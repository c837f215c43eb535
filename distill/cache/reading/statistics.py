"""What the samples of a cache hold: bytes by field, entropy, head mass, entries, and the alternatives of one sample."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.cache.format.records import pack_fields
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
    """The teacher's, in nats."""
    surprisal: float
    """The teacher's mean negative log-probability of the true next token, in nats."""
    head_mass: float | None
    """Mass that is kept exactly; None where all of it is (hidden states), or none (random draws)."""
    entries: dict[int, int]
    """Positions by their number of entries; empty for hidden states."""


def gather(reader: CacheReader, most_samples: int = 256) -> Statistics:
    """Statistics of at most `most_samples` samples."""
    count = min(len(reader), most_samples)
    chosen = np.linspace(0, len(reader) - 1, count).round().astype(int) if count else []
    sizes: Counter[str] = Counter()
    entries: Counter[int] = Counter()
    tokens = positions = 0
    entropy = surprisal = head_mass = 0.0
    for index in chosen:
        record = reader[int(index)]
        sizes.update(
            {name: len(field) for name, field in pack_fields(reader.order.ranked(record), reader.scheme).items()}
        )
        batch = collate([record], reader.scheme)
        tokens += len(record.input_ids_L)
        positions += len(batch.entropy_N)
        entropy, surprisal = entropy + float(batch.entropy_N.sum()), surprisal + float(batch.surprisal_N.sum())
        if isinstance(batch.targets, SparseTargets):
            entries.update(batch.targets.counts_N.tolist())
            is_head_NK = np.arange(batch.targets.ids_NK.shape[1]) < batch.targets.heads_N.numpy()[:, None]
            head_mass += float(batch.targets.weights_NK.numpy()[is_head_NK].sum())
    is_exact = isinstance(reader.scheme, (VarOpt, TopK))
    n = max(positions, 1)
    return Statistics(
        samples=count,
        tokens=tokens,
        positions=positions,
        bytes_by_field=dict(sizes),
        entropy=entropy / n,
        surprisal=surprisal / n,
        head_mass=head_mass / n if is_exact else None,
        entries=dict(sorted(entries.items())),
    )


def histogram(entries: dict[int, int], bins: int = 8) -> list[tuple[str, float]]:
    """Shares of the positions by number of entries, in at most `bins` ranges of equal width."""
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
    """A line for each token of a sample: the token, what the teacher gave it, and what it thought likely instead.

    `p` is the teacher's probability of the token, `H` its entropy in nats; then its most probable tokens with their
    weights. A token without numbers carries no loss. Hidden states hold no ids: there p and H are all.
    """
    record = reader[index]
    batch = collate([record], reader.scheme)
    position_of = np.cumsum(record.loss_mask_L) - 1
    lines = []
    for place, token in enumerate(record.input_ids_L):
        text = f"{_shown(tokenizer, int(token)):<16}"
        if record.position_ids_L[place] and record.loss_mask_L[place - 1]:
            position = int(position_of[place - 1])
            probability = math.exp(-float(batch.surprisal_N[position]))
            text += f"  p {probability:6.4f}  H {float(batch.entropy_N[position]):5.2f}  "
            if isinstance(batch.targets, SparseTargets):
                heads = int(batch.targets.heads_N[position])
                ids, weights = batch.targets.ids_NK[position], batch.targets.weights_NK[position]
                text += "  ".join(
                    f"{_shown(tokenizer, int(ids[k]))} {float(weights[k]):.2f}" for k in range(min(heads, most))
                )
        lines.append(text.rstrip())
    return lines


def _shown(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token]))
