"""Every divergence, of exact targets and of targets with a rest: its definition in float64, bounds, and extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.losses.chunks import ChunkTarget, DenseChunk, Divergence, SparseChunk
from distill.losses.fused import fused_loss
from distill.losses.objective import DIVERGENCES, Mixture, make_divergence
from distill.models.language_model import Head
from distill.targets.top_k import top_k

N, V = 101, 499

# Each divergence by its definition: of p and q `[N, O]`, and whether the last outcome is "any other token".
Naive = Callable[[Tensor, Tensor, bool], Tensor]


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


def naive_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * naive_kl(p, m) + (1 - beta) * naive_kl(q, m)


def naive_adaptive(p: Tensor, q: Tensor, has_rest: bool) -> Tensor:
    """As the authors do it, by sorting the vocabulary; a rest stays behind all tokens."""
    tokens = p[:, :-1] if has_rest else p
    order = tokens.argsort(dim=-1, descending=True)
    if has_rest:
        order = torch.cat([order, torch.full_like(order[:, :1], order.shape[1])], dim=1)
    sorted_p = p.gather(1, order)
    gap = (sorted_p - q.detach().gather(1, order)).abs()
    in_tail = sorted_p.cumsum(-1) > 0.5
    in_tail[:, 0] = False
    if has_rest:
        in_tail[:, -1] = True
    head, tail = (gap * ~in_tail).sum(-1), (gap * in_tail).sum(-1)
    return head / (head + tail) * naive_kl(p, q) + tail / (head + tail) * naive_kl(q, p)


CASES: dict[str, tuple[Divergence, Naive]] = {
    "forward_kl": (make_divergence("forward_kl"), lambda p, q, _: naive_kl(p, q)),
    "reverse_kl": (make_divergence("reverse_kl"), lambda p, q, _: naive_kl(q, p)),
    "jsd 0.5": (make_divergence("jsd"), lambda p, q, _: naive_jsd(p, q, 0.5)),
    "jsd 0.1": (make_divergence("jsd", beta=0.1), lambda p, q, _: naive_jsd(p, q, 0.1)),
    "skewed_kl 0": (make_divergence("skewed_kl", skew=0), lambda p, q, _: naive_kl(p, q)),
    "skewed_kl 0.1": (make_divergence("skewed_kl"), lambda p, q, _: naive_kl(p, 0.1 * p + 0.9 * q)),
    "skewed_kl 0.7": (make_divergence("skewed_kl", skew=0.7), lambda p, q, _: naive_kl(p, 0.7 * p + 0.3 * q)),
    "skewed_reverse_kl 0": (make_divergence("skewed_reverse_kl", skew=0), lambda p, q, _: naive_kl(q, p)),
    "skewed_reverse_kl 0.1": (make_divergence("skewed_reverse_kl"), lambda p, q, _: naive_kl(q, 0.1 * q + 0.9 * p)),
    "adaptive_kl": (make_divergence("adaptive_kl"), naive_adaptive),
    "total_variation": (make_divergence("total_variation"), lambda p, q, _: 0.5 * (p - q).abs().sum(-1)),
}


def can_take(name: str, kind: str) -> bool:
    return kind == "exact" or name != "mean_squared_logits"


every_case = pytest.mark.parametrize("case", CASES)
every_one = pytest.mark.parametrize("name", sorted(DIVERGENCES))


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """From open to sure, far from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_N1 = torch.linspace(0.1, 6, N, dtype=torch.float64)[:, None]
    return (torch.randn(N, V, generator=generator, dtype=torch.float64) * sharpness_N1 + 7).to(dtype)


def exact(teacher_NV: Tensor) -> DenseChunk:
    """A target that is the teacher's head on its hidden states: here the logits themselves."""
    rows, vocab_size = teacher_NV.shape
    return DenseChunk(teacher_NV, Head(torch.eye(vocab_size, dtype=teacher_NV.dtype)), torch.arange(rows))


def bucketed(probs_NV: Tensor, k: int) -> SparseChunk:
    ids_NK, weights_NK = top_k(probs_NV, k).padded()
    rest_N = coarse(probs_NV, ids_NK)[:, -1]  # 1 − Σ w would be right to the precision of 1 only
    true_ids_N = torch.zeros(len(probs_NV), dtype=torch.long)
    return SparseChunk(ids_NK, weights_NK, true_ids_N.double(), true_ids_N, rest_N)


def coarse(probs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Probabilities of the entries and of all other tokens together."""
    return torch.cat([probs_NV.gather(1, ids_NK), probs_NV.scatter(1, ids_NK, 0).sum(-1, keepdim=True)], dim=1)


def gradient(loss_N: Tensor, logits_NV: Tensor) -> Tensor:
    return torch.autograd.grad(loss_N.sum(), logits_NV)[0]


def check(found_N: Tensor, expected_N: Tensor, student_NV: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found_N, expected_N, atol=tolerance, rtol=tolerance)
    found, expected = gradient(found_N, student_NV), gradient(expected_N, student_NV)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@every_case
def test_exact_targets_give_the_definition(case: str) -> None:
    divergence, naive = CASES[case]
    target, student_NV = exact(random_logits(0)), random_logits(1).requires_grad_()
    p = target.log_probs_NV().double().exp()
    check(divergence(student_NV, target), naive(p, student_NV.softmax(-1), False), student_NV)


@every_case
@pytest.mark.parametrize("k", [1, 17, 250])
def test_targets_with_a_rest_give_that_of_entries_and_rest(case: str, k: int) -> None:
    divergence, naive = CASES[case]
    p, student_NV = random_logits(0).softmax(-1), (random_logits(1) * 0.3).requires_grad_()
    target = bucketed(p, k)
    q = coarse(student_NV.softmax(-1), target.ids_NK)
    check(divergence(student_NV, target), naive(coarse(p, target.ids_NK), q, True), student_NV)


@every_case
def test_entries_for_all_tokens_are_exact(case: str) -> None:
    """There is no other token then, whatever a rest is said to have."""
    divergence, naive = CASES[case]
    p, student_NV = random_logits(0).softmax(-1), random_logits(1).requires_grad_()
    target = replace(bucketed(p, V), rest_N=torch.full((N,), 1e-18, dtype=torch.float64))
    check(divergence(student_NV, target), naive(p, student_NV.softmax(-1), False), student_NV)


def test_a_rest_below_the_precision_of_one_counts_as_that() -> None:
    """Finite even where rounding left the teacher no rest; one that is larger is taken as it is."""
    student_NV, target = random_logits(1), bucketed(random_logits(0).softmax(-1), 17)
    values = []
    for rest in (0.0, 1e-18, 2**-52, 2**-50):
        values.append(
            DIVERGENCES["reverse_kl"](student_NV, replace(target, rest_N=torch.full_like(target.rest_N, rest)))
        )
    assert values[0].isfinite().all()
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert (values[3] < values[0]).all()


def test_the_mean_squared_logits() -> None:
    """The logits are centred, so a shift on either side changes nothing."""
    teacher_NV, student_NV = random_logits(0).float(), random_logits(1).requires_grad_()
    shift_N1 = torch.linspace(-9, 9, N, dtype=torch.float64)[:, None]
    t = teacher_NV.double() - teacher_NV.double().mean(-1, keepdim=True)
    expected_N = (student_NV - student_NV.mean(-1, keepdim=True) - t).square().mean(-1)
    found_N = DIVERGENCES["mean_squared_logits"](student_NV + shift_N1, exact(teacher_NV))
    check(found_N, expected_N, student_NV, tolerance=1e-4)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"adaptive_kl"}))  # its weights are constants by decree
def test_gradcheck(name: str) -> None:
    p = random_logits(0)[20:26, :13]
    targets: list[ChunkTarget] = [exact(p)]
    if can_take(name, "rest"):
        targets.append(bucketed(p.softmax(-1), 4))
    for target in targets:
        student_NV = random_logits(1)[20:26, :13].requires_grad_()
        assert torch.autograd.gradcheck(lambda logits, t=target: DIVERGENCES[name](logits, t), student_NV)


@every_one
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_are_at_zero(name: str, dtype: torch.dtype) -> None:
    targets: list[ChunkTarget] = [exact(random_logits(0, dtype))]
    if can_take(name, "rest"):
        probs_NV = random_logits(0, dtype).softmax(-1)
        targets += [bucketed(probs_NV, 17), bucketed(probs_NV, V)]
    for target in targets:
        logits_NV = random_logits(0, dtype).requires_grad_()
        value_N = DIVERGENCES[name](logits_NV, target)
        rounding = 2e-5 if dtype == torch.float32 or isinstance(target, DenseChunk) else 1e-9
        assert value_N.abs().max() < rounding
        if name != "total_variation":  # which has a corner there
            assert gradient(value_N, logits_NV).abs().max() < 2 * rounding


def test_bounds() -> None:
    p, student_NV = random_logits(0) * 3, random_logits(1) * 3
    for target in (exact(p), bucketed(p.softmax(-1), 17)):
        values = {case: divergence(student_NV, target) for case, (divergence, _) in CASES.items()}
        assert min(value_N.min() for value_N in values.values()) > -1e-6
        bounds = {
            "jsd 0.5": math.log(2),
            "jsd 0.1": -0.1 * math.log(0.1) - 0.9 * math.log(0.9),
            "skewed_kl 0.1": -math.log(0.1),
            "skewed_kl 0.7": -math.log(0.7),
            "skewed_reverse_kl 0.1": -math.log(0.1),
            "total_variation": 1.0,
        }
        for case, bound in bounds.items():
            assert 0.9 * bound < values[case].max() <= bound + 1e-6
        lower, upper = values["forward_kl"], values["reverse_kl"]
        between = values["adaptive_kl"]
        assert (between >= torch.minimum(lower, upper) - 1e-9).all()
        assert (between <= torch.maximum(lower, upper) + 1e-9).all()


@pytest.mark.parametrize("case", sorted(set(CASES) - {"adaptive_kl"}))
def test_a_rest_loses_and_never_adds(case: str) -> None:
    """Data processing inequality, at every k, and the more entries the less is lost."""
    divergence, naive = CASES[case]
    p, student_NV = random_logits(0).softmax(-1), random_logits(1)
    dense_N = naive(p, student_NV.softmax(-1), False)
    before_N = torch.zeros(N, dtype=torch.float64)
    for k in (1, 4, 17, 64, 256):
        value_N = divergence(student_NV, bucketed(p, k))
        assert (value_N <= dense_N + 1e-9).all() and (value_N >= before_N - 1e-9).all()
        before_N = value_N
    assert divergence(student_NV, bucketed(p, 1)).mean() < 0.95 * dense_N.mean()


@every_one
def test_extreme_logits_have_finite_losses_and_gradients(name: str) -> None:
    """Sides sure of different tokens, 160 nats apart, in float32: close to float64, nowhere infinite or NaN."""
    teacher_NV, student_NV = torch.full((3, V), -80.0), torch.full((3, V), -80.0)
    teacher_NV[:, 5], student_NV[0, 6], student_NV[1, 5] = 80, 80, 80  # apart, together, and a flat student
    for target in (exact(teacher_NV), bucketed(teacher_NV.softmax(-1), 1), bucketed(teacher_NV.softmax(-1), 3)):
        if isinstance(target, SparseChunk) and not can_take(name, "rest"):
            continue
        results = []
        for dtype in (torch.float32, torch.float64):
            logits_NV = student_NV.to(dtype).requires_grad_()
            value_N = DIVERGENCES[name](logits_NV, target)
            results.append((value_N.detach().double(), gradient(value_N, logits_NV).double()))
        for found, expected in zip(*results, strict=True):
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in sorted(DIVERGENCES) if can_take(name, "rest")])
def test_padding_is_no_entry(name: str) -> None:
    """Rows of 1 to 4 entries, padded with id 0 and weight 0: as if alone. Token 0 is an entry of some of them."""
    p = random_logits(0)[::10].softmax(-1)
    count_N = torch.arange(len(p)) % 4 + 1
    p[::2, 0] = 3.0  # the most probable token of every second row
    p = p / p.sum(-1, keepdim=True)
    ids_NK = p.topk(4).indices
    is_entry_NK = torch.arange(4) < count_N[:, None]
    weights_NK = p.gather(1, ids_NK) * is_entry_NK
    assert (ids_NK[::2, 0] == 0).all() and not (ids_NK[1::2] == 0).any()
    true_ids_N = torch.zeros(len(p), dtype=torch.long)
    padded = SparseChunk(ids_NK * is_entry_NK, weights_NK, true_ids_N, true_ids_N, 1 - weights_NK.sum(-1))
    student_NV = random_logits(1)[::10].requires_grad_()
    value_N = DIVERGENCES[name](student_NV, padded)
    grad_NV = gradient(value_N, student_NV)
    for row, count in enumerate(count_N.tolist()):
        logits_1V = student_NV.detach()[row : row + 1].requires_grad_()
        alone_1 = DIVERGENCES[name](logits_1V, bucketed(p[row : row + 1], count))
        torch.testing.assert_close(value_N[row], alone_1[0])
        torch.testing.assert_close(grad_NV[row], gradient(alone_1, logits_1V)[0])


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl"}))
def test_sparse_samples_are_refused(name: str, make_target: Callable[..., SparseChunk]) -> None:
    with pytest.raises(AssertionError, match="exact"):
        DIVERGENCES[name](random_logits(1), make_target(N, V))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in sorted(DIVERGENCES) for kind in ("exact", "rest") if can_take(name, kind)],
)
def test_fused_equals_naive_and_the_teacher_learns_nothing(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden_ND, weight_VD, bias_V, teacher_NH, teacher_VH = leaf(N, 13), leaf(V, 13), leaf(V), leaf(N, 7), leaf(V, 7)
    target: ChunkTarget = DenseChunk(teacher_NH, Head(teacher_VH), torch.arange(N), temperature=1.5)
    if kind == "rest":
        target = bucketed((teacher_NH @ teacher_VH.T).softmax(-1), 17)
    objective, head = Mixture(0.3, 1.5, make_divergence(name, beta=0.3)), Head(weight_VD, bias_V, scale=0.6)
    naive = objective(head(hidden_ND), target).sum()
    fused = fused_loss(hidden_ND, head, target, objective, chunk_size=16)
    leaves = (hidden_ND, weight_VD, bias_V, teacher_NH, teacher_VH)
    expected = torch.autograd.grad(naive, leaves, allow_unused=True)
    found = torch.autograd.grad(fused, leaves, allow_unused=True)
    torch.testing.assert_close(fused, naive)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert theirs is not None and theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)
    assert expected[3:] == (None, None) == found[3:]
