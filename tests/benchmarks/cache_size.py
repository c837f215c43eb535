"""Size against error of every scheme on real text: `python tests/benchmarks/cache_size.py NAME=FILE.jsonl.gz ...`.

For each text the demo teacher (bfloat16) reads about 4,000 tokens. Printed for each scheme, on the same positions:
bytes a token (records as they are written, token ids and scalars included), entries a position, and against the dense
target, for a student one nat away: the relative squared error of the loss's gradient in the student's hidden states,
the bias of the mean KL and the root mean square error of a position's KL. The student is the teacher with noise on its
hidden states, as much as makes KL(teacher || student) one nat. `--plot FILE.png` draws size against gradient error.
`make bench ARGS="--only cache_size"` compares the bytes with those of peers' caches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from paired import Row, Setup, number_row
from torch import Tensor

from distill.cache.format.arrays import compress
from distill.cache.format.records import Record, encode
from distill.cache.format.token_order import TokenOrder, token_counts
from distill.cache.making.extract import extract
from distill.cache.reading.batches import collate
from distill.corpus import open_corpus
from distill.losses.chunks import SparseChunk
from distill.losses.divergences import forward_kl
from distill.models import checkpoints, tokenizers
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained
from distill.models.language_model import Head
from distill.targets.next_token import next_ids
from distill.targets.schemes import AnyScheme, RandomDraws, VarOpt
from distill.targets.sparse import SparseTargets
from distill.targets.top_k import top_k

CHUNK = 256
Loss = Callable[[Tensor, slice], Tensor]
"""(student logits of a chunk, its rows) -> the loss of each position that a target makes."""


@dataclass
class Text:
    """The teacher's view of a text's positions."""

    samples: list[dict[str, Tensor]]
    hidden: list[Tensor]
    head: Head
    order: TokenOrder
    tokens: int

    def __post_init__(self) -> None:
        self.hidden_ND = torch.cat([h[s["loss_mask"]] for h, s in zip(self.hidden, self.samples, strict=True)]).float()
        self.true_ids_N = torch.cat([next_ids(s["input_ids"], s["loss_mask"]) for s in self.samples])
        self.float_head = Head(self.head.weight_VD.float())
        self.student_ND = self.hidden_ND + self._noise()
        self.log_probs = [torch.log_softmax(self.float_head(self.hidden_ND[rows]), -1) for rows in self.chunks()]
        self.entropy_N = torch.cat([-(logp.exp() * logp).sum(-1) for logp in self.log_probs])

    def chunks(self) -> list[slice]:
        return [slice(start, start + CHUNK) for start in range(0, len(self.hidden_ND), CHUNK)]

    def _noise(self) -> Tensor:
        """Noise that takes the student one nat from the teacher (bisection on 512 positions)."""
        noise_ND = torch.randn(self.hidden_ND.shape, generator=torch.Generator().manual_seed(0))
        few = slice(0, 512)
        logp = torch.log_softmax(self.float_head(self.hidden_ND[few]), -1)
        low, high = 0.0, 100.0
        for _ in range(20):
            middle = (low + high) / 2
            logq = torch.log_softmax(self.float_head(self.hidden_ND[few] + middle * noise_ND[few]), -1)
            low, high = (low, middle) if (logp.exp() * (logp - logq)).sum(-1).mean() > 1 else (middle, high)
        return noise_ND * low

    def losses_and_gradients(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """`[N]` losses and their gradients in the student's hidden states `[N, D]`."""
        losses, gradients = [], []
        for rows in self.chunks():
            hidden_ND = self.student_ND[rows].clone().requires_grad_(True)
            losses_N = loss(self.float_head(hidden_ND), rows)
            (gradient_ND,) = torch.autograd.grad(losses_N.sum(), hidden_ND)
            losses.append(losses_N.detach())
            gradients.append(gradient_ND)
        return torch.cat(losses), torch.cat(gradients)

    def dense(self, logits_NV: Tensor, rows: slice) -> Tensor:
        logp = self.log_probs[rows.start // CHUNK]
        return (logp.exp() * (logp - torch.log_softmax(logits_NV, -1))).sum(-1)


@dataclass(frozen=True)
class SchemeRow:
    """One line of the table."""

    name: str
    bytes_per_token: float
    entries: float
    gradient_error: float
    kl_bias: float
    kl_rms: float

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.bytes_per_token:,.1f} | {self.entries:,.1f} | {self.gradient_error:.4f} | "
            f"{self.kl_bias:+.4f} | {self.kl_rms:.3f} |"
        )


SPEECHES = Path(__file__).resolve().parents[2] / "data" / "sotu.jsonl"


def rows(setup: Setup) -> Iterator[Row]:
    """Yield bytes a token of the default scheme against top-k caches as peers store them; theirs without token ids.

    DistillKit's are its README's two recommendations: ids in as many bits as the vocabulary needs, `exact_k` values in
    bfloat16, the others as float32 coefficients of a few functions (github.com/arcee-ai/DistillKit).
    """
    text = read(str(SPEECHES), 256, 200 if setup.tiny else 4000)
    size = scheme_bytes(text, own_records(text, VarOpt(0.02)), VarOpt(0.02))
    id_bytes = math.ceil(math.log2(text.float_head.weight_VD.shape[0])) / 8
    peers = {
        "top-k 100, int32 ids and float16 values": 100 * (4 + 2),
        "DistillKit, k 128": 128 * id_bytes + 16 * 2 + 6 * 4,
        "DistillKit, k 50 (its budget pick)": 50 * id_bytes + 2 + 3 * 4,
        "dense bfloat16": 2 * text.float_head.weight_VD.shape[0],
    }
    for name, peer in peers.items():
        yield number_row("cache_size", "varopt τ = 1/50, speeches", f"bytes a token of {name}", size, peer)


def read(path: str, sequence_length: int, tokens: int) -> Text:
    checkpoint = checkpoints.resolve("smollm2-135m-demo")
    tokenizer = tokenizers.load_tokenizer(checkpoint)
    model = HuggingFaceLanguageModel(load_pretrained(checkpoint, torch.bfloat16)).eval()
    sets = open_corpus(path, tokenizer, sequence_length=sequence_length, held_out=0)
    samples, seen = [], 0
    while seen < tokens:
        samples.append(sets.train[len(samples)])
        seen += int(samples[-1]["loss_mask"].sum())
    with torch.no_grad():
        hidden = [model.body(s["input_ids"][None], s["position_ids"][None])[0] for s in samples]
    vocab_size = tokenizers.vocab_size(tokenizer)
    order = TokenOrder.by_frequency(token_counts(sets.train, len(sets.train), vocab_size))
    return Text(samples, hidden, model.head.with_rows(vocab_size), order, sequence_length * len(samples))


def own_scheme(text: Text, name: str, scheme: AnyScheme, reference: tuple[Tensor, Tensor]) -> SchemeRow:
    """A scheme of ours: through records as they are written and read."""
    records = own_records(text, scheme)
    size = scheme_bytes(text, records, scheme)
    batch = collate(records)
    whole = SparseChunk(*batch.targets.padded(), text.entropy_N, text.true_ids_N)
    entries = float(batch.targets.counts_N.float().mean())
    return _row(name, size, entries, text, lambda logits, rows: forward_kl(logits, whole[rows]), reference)


def own_records(text: Text, scheme: AnyScheme) -> list[Record]:
    """Return the samples as a cache keeps them."""
    return [
        extract(hidden_LD, text.head, s["input_ids"], s["position_ids"], s["loss_mask"], scheme, seed=0)
        for hidden_LD, s in zip(text.hidden, text.samples, strict=True)
    ]


def scheme_bytes(text: Text, records: list[Record], scheme: AnyScheme) -> float:
    """Return the bytes a token that records take in a shard."""
    return sum(len(encode(text.order.ranked(record), scheme)) for record in records) / text.tokens


def top_k_rows(text: Text, k: int, reference: tuple[Tensor, Tensor]) -> list[SchemeRow]:
    """Top-k with bfloat16 values as peers keep them (ids and values packed by the same codec), read in three ways."""
    parts = [top_k(logp.exp(), k) for logp in text.log_probs]
    ids_NK, weights_NK = SparseTargets.cat(parts).padded()
    weights_NK = weights_NK.bfloat16()
    bits = weights_NK.view(torch.int16).numpy().view(np.uint16)
    size = len(compress(text.order.ranks_V[ids_NK.numpy()].astype(np.uint32).ravel())) + len(compress(bits.ravel()))
    size += sum(
        len(compress(text.order.ranks_V[sample["input_ids"].numpy()].astype(np.uint32))) for sample in text.samples
    )
    weights_NK = weights_NK.float()
    rest_N = (1 - weights_NK.sum(-1)).clamp(min=0)
    shares_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    own_entropy_N = -torch.xlogy(shares_NK, shares_NK).sum(-1)
    bucket = SparseChunk(ids_NK, weights_NK, text.entropy_N, text.true_ids_N, rest_N)
    renormalised = SparseChunk(ids_NK, shares_NK, own_entropy_N, text.true_ids_N)

    def left_out(logits_NV: Tensor, rows: slice) -> Tensor:
        logq_NK = torch.log_softmax(logits_NV, -1).gather(1, ids_NK[rows])
        return (torch.xlogy(weights_NK[rows], weights_NK[rows]) - weights_NK[rows] * logq_NK).sum(-1)

    ways: dict[str, Loss] = {
        "renormalised": lambda logits, rows: forward_kl(logits, renormalised[rows]),
        "rest left out": left_out,
        "tail bucket": lambda logits, rows: forward_kl(logits, bucket[rows]),
    }
    return [_row(f"top-k {k}, {way}", size / text.tokens, k, text, loss, reference) for way, loss in ways.items()]


def _row(name: str, size: float, entries: float, text: Text, loss: Loss, reference: tuple[Tensor, Tensor]) -> SchemeRow:
    losses_N, gradients_ND = text.losses_and_gradients(loss)
    dense_N, dense_ND = reference
    error = ((gradients_ND - dense_ND).square().sum() / dense_ND.square().sum()).item()
    difference_N = losses_N - dense_N
    return SchemeRow(name, size, entries, error, difference_N.mean().item(), difference_N.square().mean().sqrt().item())


def measure(text: Text) -> list[SchemeRow]:
    reference = text.losses_and_gradients(text.dense)
    rows = [
        own_scheme(text, f"varopt τ = 1/{inverse}", VarOpt(1 / inverse), reference) for inverse in (25, 50, 100, 200)
    ]
    for k in (12, 32, 64, 128):
        rows += top_k_rows(text, k, reference)
    rows.append(own_scheme(text, "random N = 50", RandomDraws(50), reference))
    vocab_size = text.float_head.weight_VD.shape[0]
    rows.append(SchemeRow("dense, bfloat16", 2.0 * vocab_size, vocab_size, 0.0, 0.0, 0.0))
    return rows


def plot(tables: dict[str, list[SchemeRow]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.6), sharey=True, squeeze=False)
    families = {"varopt": "o-", "renormalised": "s--", "rest left out": "^--", "tail bucket": "v--", "random": "D"}
    for axis, (name, rows) in zip(axes[0], tables.items(), strict=True):
        for family, style in families.items():
            chosen = [row for row in rows if family in row.name]
            label = f"top-k, {family}" if "top-k" in chosen[0].name else family
            axis.plot([r.bytes_per_token for r in chosen], [r.gradient_error for r in chosen], style, label=label, ms=4)
        axis.set(title=name, xscale="log", yscale="log", xlabel="bytes a token")
        axis.set_xticks([10, 20, 50, 100, 200], labels=["10", "20", "50", "100", "200"])
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("relative squared gradient error")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--plot")
    options = parser.parse_args()
    tables = {}
    for argument in options.texts:
        name, path = argument.split("=", 1)
        text = read(path, options.sequence_length, options.tokens)
        tables[name] = measure(text)
        positions = len(text.hidden_ND)
        print(f"\n{name}: {positions:,} positions, mean entropy {text.entropy_N.mean():.2f} nats\n")
        print(
            "| scheme | bytes a token | entries | gradient error | KL bias | KL rms |\n|---|---:|---:|---:|---:|---:|"
        )
        for row in tables[name]:
            print(row)
        assert all(math.isfinite(row.gradient_error) for row in tables[name])
    if options.plot:
        plot(tables, options.plot)


if __name__ == "__main__":
    main()
