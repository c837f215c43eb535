"""Sums of the metrics by document or sample, teacher's entropy, position and source, and the means made from them.

Shapes: N positions that carry loss, V vocabulary, S clusters, K metrics, M bins of confidence. Every position counts
the same, however the positions are cut into chunks, batches and devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from distill.errors import UserError
from distill.evaluation import metrics
from distill.evaluation.statistics import ClusterSums, intervals

ENTROPY_EDGES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Lower edges of the bins of the teacher's entropy, nats. The last bin has no upper edge."""
POSITION_EDGES = (0, 4, 16, 64, 256, 1024, 4096)
"""Lower edges of the bins of the position, tokens since the document's or sample's beginning. The last has no end."""
IN_BINS = ("nll", "kl", "top1_agreement", "acceptance")
"""Metrics that are reported for each bin, if they were measured."""


def bin_numbers(values_N: Tensor, edges: Sequence[float]) -> Tensor:
    """Return the bin's number (`[N]`, int64) for each value: b for `edges[b] <= value < edges[b + 1]`."""
    inner = torch.tensor(edges[1:], dtype=values_N.dtype, device=values_N.device)
    return torch.bucketize(values_N, inner, right=True)


@dataclass(frozen=True, eq=False)
class Measured:
    """A model on the held-out text: float64 sums of K metrics, and int64 numbers of positions."""

    names: tuple[str, ...]
    """Names of the K metrics."""
    cluster_sums: np.ndarray
    """Sums by cluster, `[S, K]`."""
    cluster_positions: np.ndarray
    """Positions with loss of each cluster, `[S]`."""
    entropy_sums: np.ndarray
    """Sums by the teacher's entropy, `[7, K]`; the bins are `ENTROPY_EDGES`."""
    entropy_positions: np.ndarray
    position_sums: np.ndarray
    """Sums by position, `[7, K]`; the bins are `POSITION_EDGES`."""
    position_positions: np.ndarray
    source_sums: np.ndarray
    """Sums by cluster and source of the text, `[S · sources, K]`: those of a cluster's sources are together."""
    source_positions: np.ndarray
    gap_sums: np.ndarray
    """Sums of the confidence gap by confidence, `[M]`, for the expected calibration error."""
    text_bytes: int | None = None
    """UTF-8 bytes of the text that the positions predict. None means that there are no bits per byte."""
    source_names: tuple[str, ...] = ()
    """Names of the sources, if there are several."""

    @property
    def tokens(self) -> int:
        """Number of positions with loss."""
        return int(self.cluster_positions.sum())

    @property
    def clusters(self) -> int:
        """Number of documents or samples that are resampled, those with positions."""
        return int((self.cluster_positions > 0).sum())

    @cached_property
    def sums(self) -> ClusterSums:
        """Sums by cluster, in the form that `statistics.compare` takes."""
        return ClusterSums(self.cluster_positions, dict(zip(self.names, self.cluster_sums.T, strict=True)))

    def summary(self) -> dict[str, Any]:
        """Return the means over positions, as the model's entry in `evaluation.json`.

        It has the metrics by name, `perplexity`, `ece`, and `bits_per_byte` if the text's bytes are known. `intervals`
        holds 95 % intervals: those of perplexity and bits per byte are the nll's, converted; `ece` has none, since
        resampling adds to its bias. `by_entropy` and `by_position` are lists of bins without the empty ones, and
        `by_source`, where there are several, of the sources with positions, each with intervals of its own. A
        perplexity, or an interval of one, that no float can hold is left out, because JSON has no infinity.
        """
        result: dict[str, Any] = {name: self.sums.mean(name) for name in self.names}
        if math.isfinite(perplexity := metrics.perplexity(result["nll"])):
            result["perplexity"] = perplexity
        result["ece"] = metrics.expected_calibration_error(torch.from_numpy(self.gap_sums), self.tokens)
        found: dict[str, list[float]] = intervals(self.sums)
        ends = [metrics.perplexity(end) for end in found.get("nll", [])]
        if ends and "perplexity" in result and all(map(math.isfinite, ends)):
            found["perplexity"] = ends
        if self.text_bytes:
            tokens, size = self.tokens, self.text_bytes
            result["bits_per_byte"] = metrics.bits_per_byte(result["nll"], tokens, size)
            if "nll" in found:
                found["bits_per_byte"] = [metrics.bits_per_byte(end, tokens, size) for end in found["nll"]]
        if self.source_names:
            found_of = map(self._of_source, range(len(self.source_names)))
            result["by_source"] = [
                {"source": name, **each}
                for name, each in zip(self.source_names, found_of, strict=True)
                if each["positions"]
            ]
        return result | {
            "intervals": found,
            "by_entropy": self._bins(ENTROPY_EDGES, self.entropy_sums, self.entropy_positions),
            "by_position": self._bins(POSITION_EDGES, self.position_sums, self.position_positions),
        }

    def _of_source(self, number: int) -> dict[str, Any]:
        """Return the means of one source's positions, with the intervals that its own clusters give."""
        sources = len(self.source_names)
        sums_SK, positions_S = self.source_sums[number::sources], self.source_positions[number::sources]
        if not positions_S.any():
            return {"positions": 0}
        columns = [column for column, name in enumerate(self.names) if name in IN_BINS]
        own = ClusterSums(positions_S, {self.names[column]: sums_SK[:, column] for column in columns})
        return self._means(sums_SK.sum(0), int(positions_S.sum())) | {"intervals": intervals(own)}

    def _bins(self, edges: Sequence[float], sums: np.ndarray, positions: np.ndarray) -> list[dict[str, Any]]:
        ends = [*edges[1:], None]
        return [
            {"from": edges[number], "to": ends[number], **self._means(sums[number], int(positions[number]))}
            for number in positions.nonzero()[0].tolist()
        ]

    def _means(self, sums: np.ndarray, positions: int) -> dict[str, Any]:
        means = {name: float(sums[column] / positions) for column, name in enumerate(self.names) if name in IN_BINS}
        return {"positions": positions, **means}


@dataclass(frozen=True, eq=False)
class Places:
    """The places of N positions, and the true next tokens there; int64 each."""

    next_ids_N: Tensor
    clusters_N: Tensor
    """Number of the document or sample that is resampled as a whole, from 0."""
    positions_N: Tensor
    """Number of tokens before the position in its document and sample (`position_ids`)."""
    sources_N: Tensor | None = None
    """Number of the text's source; None where there is one."""


class _SumsOverPositions(Metric):
    """Sums of named per-position values by cluster, by the teacher's entropy and by position.

    The state is float64 sums and counts, which add up across devices whichever of them counts a position.
    torchmetrics' MulticlassCalibrationError would keep the confidence of every position. The sums stay on the metric's
    device. That is the CPU, even if the values come from a card, since not every accelerator knows float64; it is the
    card after `.to(card)`, as a sum over several cards needs it.
    """

    full_state_update = False
    names: tuple[str, ...] = ()
    cluster_sums: Tensor
    gap_sums: Tensor

    def __init__(self, clusters: int, sources: int = 1) -> None:
        super().__init__()
        self._sources = sources
        rows = {"cluster": clusters, "entropy": len(ENTROPY_EDGES), "position": len(POSITION_EDGES)}
        for kind, size in (rows | {"source": clusters * sources}).items():
            sums, counts = torch.zeros(size, len(self.names), dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
            self.add_state(f"{kind}_sums", sums, dist_reduce_fx="sum")
            self.add_state(f"{kind}_positions", counts, dist_reduce_fx="sum")
        self.add_state("gap_sums", torch.zeros(metrics.BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, logp_NV: Tensor, teacher_entropy_N: Tensor, places: Places, values: dict[str, Tensor]) -> None:
        """Add N positions: the measured model's log-probabilities, the teacher's entropy, and values `[N]` by name."""
        device = self.gap_sums.device
        outcomes = metrics.top1_outcomes(logp_NV, places.next_ids_N)
        confidence_N, right_N = (outcome_N.to(device).double() for outcome_N in outcomes)
        gaps_N = confidence_N - right_N
        self.gap_sums.index_add_(0, metrics.confidence_bins(confidence_N), gaps_N)
        values = {**values, "confidence_gap": gaps_N}
        assert set(values) == set(self.names), (sorted(values), self.names)
        values_NK = torch.stack([values[name].to(device).double() for name in self.names], dim=-1)
        sources_N = torch.zeros_like(places.clusters_N) if places.sources_N is None else places.sources_N
        rows = {
            "source": (places.clusters_N * self._sources + sources_N).to(device),
            "cluster": places.clusters_N.to(device),
            "entropy": bin_numbers(teacher_entropy_N.to(device), ENTROPY_EDGES),
            "position": bin_numbers(places.positions_N.to(device), POSITION_EDGES),
        }
        for kind, rows_N in rows.items():
            getattr(self, f"{kind}_sums").index_add_(0, rows_N, values_NK)
            getattr(self, f"{kind}_positions").index_add_(0, rows_N, torch.ones_like(rows_N))

    def compute(self) -> dict[str, np.ndarray]:
        """Return the sums. Raises UserError if there was no position at all."""
        state = {name: getattr(self, name).cpu().numpy() for name in self._defaults}
        if not state["cluster_positions"].any():
            raise UserError(
                "evaluation: nothing to measure, no held-out position carries loss "
                "(no held-out text, or all of it masked); give more text, or hold more of it out"
            )
        return state

    def measured(self, text_bytes: int | None = None, source_names: tuple[str, ...] = ()) -> Measured:
        """Return the counts so far, from all devices. Raises UserError if there was no position at all."""
        return Measured(names=self.names, **self.compute(), text_bytes=text_bytes, source_names=source_names)


class Fidelity(_SumsOverPositions):
    """A student against its teacher.

    `nll` is the student's on the true next token, `kl` is KL(teacher ‖ student), `reverse_kl` KL(student ‖ teacher),
    `jsd` Jensen and Shannon's divergence (all nats/token, at least 0). `top1_agreement`, `top5_agreement` and
    `acceptance` are shares between 0 and 1. `confidence_gap` is the probability of the student's top-1 token minus the
    share in which that is the true next token, from -1 to 1 (above 0: too sure of itself). The vocabulary is the real
    one: padded rows of a head are cut off before (`Head.with_rows`).
    """

    names = ("nll", "kl", "reverse_kl", "jsd", "top1_agreement", "top5_agreement", "acceptance", "confidence_gap")

    @torch.no_grad()
    def update(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, places: Places) -> None:
        """Count N positions with loss: both models' logits there, and the places."""
        assert student_logits_NV.shape == teacher_logits_NV.shape, (student_logits_NV.shape, teacher_logits_NV.shape)
        assert places.next_ids_N.shape == student_logits_NV.shape[:-1], (
            places.next_ids_N.shape,
            student_logits_NV.shape,
        )
        student_NV = metrics.log_probabilities(student_logits_NV)
        teacher_NV = metrics.log_probabilities(teacher_logits_NV)
        values = {
            "nll": metrics.negative_log_likelihood(student_NV, places.next_ids_N),
            "kl": metrics.kl_divergence(student_NV, teacher_NV),
            "reverse_kl": metrics.reverse_kl_divergence(student_NV, teacher_NV),
            "jsd": metrics.js_divergence(student_NV, teacher_NV),
            "top1_agreement": metrics.top1_agreement(student_logits_NV, teacher_logits_NV),
            "top5_agreement": metrics.top5_agreement(student_logits_NV, teacher_logits_NV),
            "acceptance": metrics.acceptance_rate(student_NV, teacher_NV),
        }
        self._add(student_NV, metrics.entropy(teacher_NV), places, values)


class Likelihood(_SumsOverPositions):
    """A model alone on real text: `nll` of the true next token and `confidence_gap`. The entropy is the model's own."""

    names = ("nll", "confidence_gap")

    @torch.no_grad()
    def update(self, logits_NV: Tensor, places: Places) -> None:
        """Count N positions with loss: the model's logits there, and the places."""
        assert places.next_ids_N.shape == logits_NV.shape[:-1], (places.next_ids_N.shape, logits_NV.shape)
        logp_NV = metrics.log_probabilities(logits_NV)
        nll_N = metrics.negative_log_likelihood(logp_NV, places.next_ids_N)
        self._add(logp_NV, metrics.entropy(logp_NV), places, {"nll": nll_N})
