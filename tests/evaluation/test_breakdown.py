"""Sums by sample and by bin: against a dense float64 program, however the positions are cut, and adding up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.evaluation.breakdown import (
    ENTROPY_EDGES,
    POSITION_EDGES,
    Fidelity,
    Likelihood,
    Places,
    bin_numbers,
)
from distill.evaluation.metrics import bits_per_byte, perplexity

N, V, S = 253, 1009, 17


def draw_logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits `[N, V]` with peaks as a language model has them: from sure to open rows, and far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_N1 = torch.rand(N, 1, generator=generator, dtype=torch.float64) * 5
    return (torch.randn(N, V, generator=generator, dtype=torch.float64) * sharpness_N1 + 20).to(dtype)


def draw_places(seed: int = 1, vocabulary: int = V) -> Places:
    """Samples of unequal size, none of them sample 3; positions up to 5,000."""
    generator = torch.Generator().manual_seed(seed)
    samples_N = (torch.rand(N, generator=generator) ** 2 * S).long()
    positions_N = (torch.rand(N, generator=generator) * 8.5).exp().long()
    return Places(
        torch.randint(vocabulary, (N,), generator=generator),
        torch.where(samples_N == 3, 4, samples_N).sort().values,
        positions_N,
    )


def of(places: Places, rows: Any) -> Places:
    return Places(places.next_ids_N[rows], places.clusters_N[rows], places.positions_N[rows])


def counted(student: Tensor, teacher: Tensor, places: Places, chunk: int = N) -> Fidelity:
    metric = Fidelity(S)
    for rows in torch.arange(len(student)).split(chunk):
        metric.update(student[rows], teacher[rows], of(places, rows))
        metric.update(student[:0], teacher[:0], of(places, slice(0, 0)))  # a batch without loss changes nothing
    return metric


def dense(student: Tensor, teacher: Tensor, places: Places) -> tuple[dict[str, Tensor], Tensor]:
    """Every metric at every position by its definition in float64, and the teacher's entropy."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    m = (p + q) / 2
    fives = [logits.argsort(dim=-1, descending=True, stable=True)[:, :5].tolist() for logits in (student, teacher)]
    top1, ids = q.argmax(-1), places.next_ids_N
    values = {
        "nll": -q[torch.arange(N), ids].log(),
        "kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": (p * (p / m).log() + q * (q / m).log()).sum(-1) / 2,
        "top1_agreement": (top1 == p.argmax(-1)).double(),
        "top5_agreement": torch.tensor([len({*a} & {*b}) / 5 for a, b in zip(*fives, strict=True)]).double(),
        "acceptance": torch.minimum(p, q).sum(-1),
        "confidence_gap": q.max(-1).values - (top1 == ids).double(),
    }
    return values, -(p * p.log()).sum(-1)


def numbers(summary: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested summary as one flat dict."""
    flat: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= numbers(value, f"{prefix}{name} ")
        else:
            flat[f"{prefix}{name}"] = math.inf if value is None else value  # None: a bin without an end
    return flat


def test_means_sample_sums_and_bins_match_a_dense_float64_program() -> None:
    student, teacher, places = draw_logits(1), draw_logits(2), draw_places()
    values, entropy_N = dense(student, teacher, places)
    measured = counted(student, teacher, places).measured()
    summary = measured.summary()
    assert set(measured.names) == set(values) and measured.tokens == N
    for name, values_N in values.items():
        assert summary[name] == pytest.approx(float(values_N.mean()), rel=2e-6), name
        by_sample = [float(values_N[places.clusters_N == sample].sum()) for sample in range(S)]
        np.testing.assert_allclose(measured.sums.values[name], by_sample, rtol=5e-6, atol=2e-5)
    assert measured.sums.positions.tolist() == [int((places.clusters_N == sample).sum()) for sample in range(S)]
    assert measured.sums.positions[3] == 0
    for key, edges, where_N in (
        ("by_entropy", ENTROPY_EDGES, entropy_N),
        ("by_position", POSITION_EDGES, places.positions_N),
    ):
        expected = []
        for begin, end in zip(edges, [*edges[1:], math.inf], strict=True):
            inside = (where_N >= begin) & (where_N < end)
            if inside.any():
                bin = {"from": begin, "to": None if end == math.inf else end, "positions": int(inside.sum())}
                names = ("nll", "kl", "top1_agreement", "acceptance")
                expected.append(bin | {name: float(values[name][inside].mean()) for name in names})
        assert len(expected) > 4
        assert [list(bin) for bin in summary[key]] == [list(bin) for bin in expected]
        assert numbers({"": summary[key]}) == pytest.approx(numbers({"": expected}), rel=2e-5)


def test_bins_add_up_to_the_whole() -> None:
    measured = counted(draw_logits(1), draw_logits(2), draw_places()).measured()
    for sums, positions in (
        (measured.entropy_sums, measured.entropy_positions),
        (measured.position_sums, measured.position_positions),
    ):
        np.testing.assert_allclose(sums.sum(0), measured.cluster_sums.sum(0), rtol=1e-12)
        assert positions.sum() == N
    summary = measured.summary()
    for key in ("by_entropy", "by_position"):
        assert sum(bin["positions"] * bin["kl"] for bin in summary[key]) / N == pytest.approx(summary["kl"], rel=1e-12)
    gaps = measured.gap_sums.sum() / N
    assert gaps == pytest.approx(summary["confidence_gap"], rel=1e-12)
    assert abs(gaps) <= summary["ece"]


def test_bins_are_closed_below_and_the_last_has_no_end() -> None:
    edges = torch.tensor([0.0, 0.49, 0.5, 1.0, 2.0, 3.9, 4.0, 5.9, 6.0, 99.0])
    assert bin_numbers(edges, ENTROPY_EDGES).tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 6]
    positions = torch.tensor([0, 3, 4, 15, 16, 63, 64, 255, 256, 1023, 1024, 4095, 4096, 10**9])
    assert bin_numbers(positions, POSITION_EDGES).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_empty_bins_are_left_out() -> None:
    places = draw_places()
    low = Places(places.next_ids_N, places.clusters_N, places.positions_N.clamp_max(3))
    summary = counted(draw_logits(1), draw_logits(2), low).measured().summary()
    assert [(bin["from"], bin["to"], bin["positions"]) for bin in summary["by_position"]] == [(0, 4, N)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 252, 253])
def test_nothing_depends_on_how_positions_are_cut(chunk: int) -> None:
    student, teacher, places = draw_logits(1), draw_logits(2), draw_places()
    whole, cut = counted(student, teacher, places).measured(), counted(student, teacher, places, chunk).measured()
    # What is left is the last bit of a row's own sums; 255 / 253 would show were chunks averaged.
    assert numbers(cut.summary()) == pytest.approx(numbers(whole.summary()), rel=1e-6)
    np.testing.assert_allclose(cut.cluster_sums, whole.cluster_sums, rtol=1e-6)
    alone = Likelihood(S)
    for rows in torch.arange(N).split(chunk):
        alone.update(student[rows], of(places, rows))
    likelihood = alone.measured().summary()
    for key in ("nll", "ece", "confidence_gap", "perplexity", "by_position"):
        mine = numbers({"": likelihood[key]})
        assert mine == pytest.approx({name: numbers({"": whole.summary()[key]})[name] for name in mine}, rel=1e-6)


def test_a_student_equal_to_its_teacher_is_perfect() -> None:
    logits, places = draw_logits(1), draw_places()
    summary = counted(logits.clone(), logits, places).measured().summary()
    assert [summary[name] for name in ("kl", "reverse_kl", "jsd")] == [0, 0, 0]
    assert [summary[name] for name in ("top1_agreement", "top5_agreement", "acceptance")] == [1, 1, 1]
    assert summary["intervals"]["kl"] == [0, 0] and summary["intervals"]["acceptance"] == [1, 1]


def test_the_teachers_bins_are_of_its_own_entropy() -> None:
    teacher, places = draw_logits(2), draw_places()
    alone = Likelihood(S)
    alone.update(teacher, places)
    beside = counted(draw_logits(1), teacher, places).measured().summary()["by_entropy"]
    assert [{**bin, "nll": 0} for bin in alone.measured().summary()["by_entropy"]] == [
        {"from": bin["from"], "to": bin["to"], "positions": bin["positions"], "nll": 0} for bin in beside
    ]


def test_a_summary_is_what_json_can_hold_and_converts_the_interval_of_the_likelihood() -> None:
    metric = counted(draw_logits(1), draw_logits(2), draw_places())
    summary = metric.measured(text_bytes=700).summary()
    assert json.loads(json.dumps(summary)) == summary
    low, high = summary["intervals"]["nll"]
    assert low < summary["nll"] < high
    assert summary["perplexity"] == perplexity(summary["nll"])
    assert summary["intervals"]["perplexity"] == [perplexity(low), perplexity(high)]
    assert summary["bits_per_byte"] == bits_per_byte(summary["nll"], N, 700)
    assert summary["intervals"]["bits_per_byte"] == [bits_per_byte(low, N, 700), bits_per_byte(high, N, 700)]
    without = metric.measured().summary()
    assert "bits_per_byte" not in without and "bits_per_byte" not in without["intervals"]
    assert "ece" not in summary["intervals"]


def test_a_perplexity_that_no_float_can_hold_is_left_out() -> None:
    places = draw_places()
    metric = counted(draw_logits(1), draw_logits(2), places)
    nll = metric.names.index("nll")
    metric.cluster_sums[:, nll] *= 720 / metric.measured().summary()["nll"]
    summary = metric.measured().summary()
    assert summary["nll"] == pytest.approx(720) and summary["intervals"]["nll"][0] < 709 < summary["nll"]
    assert "perplexity" not in summary and "perplexity" not in summary["intervals"]
    metric.cluster_sums[:, nll] *= 705 / 720
    summary = metric.measured().summary()
    assert math.isfinite(summary["perplexity"]) and summary["intervals"]["nll"][1] > 710
    assert "perplexity" not in summary["intervals"]
    json.dumps(summary, allow_nan=False)


def test_few_samples_have_no_intervals() -> None:
    places = draw_places()
    four = Places(places.next_ids_N, places.clusters_N % 4, places.positions_N)
    assert counted(draw_logits(1), draw_logits(2), four).measured().summary()["intervals"] == {}


def test_sums_keep_what_float32_would_lose() -> None:
    """After 2^24 positions a float32 count stands still, and its sums round each chunk away."""
    metric, zero = Likelihood(2), torch.zeros(1, dtype=torch.int64)
    metric.cluster_sums[0, metric.names.index("nll")] += 2.0**27
    metric.cluster_positions[0] += 2**24
    for _ in range(4):
        metric.update(torch.zeros(1, 2), Places(zero, zero, zero))
    measured = metric.measured()
    assert measured.tokens == 2**24 + 4
    assert measured.summary()["nll"] * measured.tokens - 2.0**27 == pytest.approx(4 * math.log(2), rel=1e-6)


def test_devices_add_up() -> None:
    """Two processes' states, added as torchmetrics adds them, give the sums over all positions."""
    student, teacher, places = draw_logits(1), draw_logits(2), draw_places()
    first = counted(student[:50], teacher[:50], of(places, slice(50)))
    second = counted(student[50:], teacher[50:], of(places, slice(50, None)))
    assert all(reduce is torch.sum or reduce.__name__ == "dim_zero_sum" for reduce in first._reductions.values())
    for name in first._defaults:
        setattr(first, name, getattr(first, name) + getattr(second, name))
    whole = counted(student, teacher, places).measured().summary()
    assert numbers(first.measured().summary()) == pytest.approx(numbers(whole), rel=1e-6)


def test_reset_forgets() -> None:
    metric = counted(draw_logits(1), draw_logits(2), draw_places())
    before = metric.measured()
    metric.reset()
    metric.update(draw_logits(2), draw_logits(2), draw_places())
    after = metric.measured()
    assert after.tokens == N and after.summary()["kl"] == 0
    assert before.summary()["kl"] > 1, "what was measured before is not touched"


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_measured_is_an_error_not_nan() -> None:
    fidelity, likelihood = Fidelity(S), Likelihood(S)
    nothing, empty = of(draw_places(), slice(0, 0)), torch.empty(0, V)
    for _ in range(2):
        for metric in (fidelity, likelihood):
            with pytest.raises(UserError, match="no held-out position carries loss"):
                metric.measured()
        fidelity.update(empty, empty, nothing)
        likelihood.update(empty, nothing)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_nan_is_not_swept_under_a_mean() -> None:
    logits = draw_logits(1)
    broken = logits.clone()
    broken[17, 3] = math.nan
    for student, teacher in ((broken, logits), (logits, broken)):
        summary = counted(student, teacher, draw_places()).measured().summary()
        for name in ("kl", "reverse_kl", "jsd", "acceptance"):
            assert math.isnan(summary[name]) and name not in summary["intervals"], name
        for name in ("ece", "confidence_gap", "nll"):
            assert math.isnan(summary[name]) == (student is broken), name
        assert ("nll" in summary["intervals"]) == (student is logits)


def test_shapes_must_match() -> None:
    with pytest.raises(AssertionError):
        Fidelity(S).update(draw_logits(1)[:, :-1], draw_logits(2), draw_places())
    with pytest.raises(AssertionError):
        Likelihood(S).update(draw_logits(1)[1:], draw_places())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_values_from_a_card_meet_sums_on_the_cpu() -> None:
    student, teacher, places = draw_logits(1), draw_logits(2), draw_places()
    here = numbers(counted(student, teacher, places).measured().summary())
    on_card = Places(places.next_ids_N.cuda(), places.clusters_N, places.positions_N)
    for metric in (Fidelity(S), Fidelity(S).to("cuda")):
        metric.update(student.cuda(), teacher.cuda(), on_card)
        assert numbers(metric.measured().summary()) == pytest.approx(here, rel=1e-5)


def test_a_sources_intervals_are_those_of_its_positions_alone() -> None:
    """A cluster may have positions of both sources, as a sample does."""
    student, teacher, places = draw_logits(0), draw_logits(1), draw_places()
    sources_N = (torch.arange(N) * 7 % 3 == 0).long()
    both = Fidelity(S, sources=2)
    both.update(student, teacher, replace(places, sources_N=sources_N))
    summary = both.measured(source_names=("notes", "chats")).summary()
    assert summary["kl"] == pytest.approx(counted(student, teacher, places).measured().summary()["kl"])
    for number, found in enumerate(summary["by_source"]):
        rows = sources_N == number
        alone = counted(student[rows], teacher[rows], of(places, rows), 64).measured().summary()
        assert found["source"] == ("notes", "chats")[number] and found["positions"] == int(rows.sum())
        assert set(found["intervals"]) == {"nll", "kl", "top1_agreement", "acceptance"}
        for name, ends in found["intervals"].items():
            assert ends == pytest.approx(alone["intervals"][name])
