"""From hidden states to stored targets: the right next token, the same in any chunks, blind to what the mask hides."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache.making.extract import extract
from distill.errors import UserError
from distill.models.language_model import Head
from distill.targets import schemes
from distill.targets.next_token import next_ids

L, D, V = 61, 8, 409
VAROPT = schemes.make("varopt", threshold=0.05, draws=2)
ALL = [
    VAROPT,
    schemes.make("top_k", entries=7),
    schemes.make("random", entries=20),
    schemes.make("random", entries=20, exponent=0.8),
    schemes.make("hidden", size=D),
]


def sample(seed: int = 0) -> dict[str, Any]:
    """A sample of two documents whose logits are whole numbers: no product depends on the chunks it is done in."""
    generator = torch.Generator().manual_seed(seed)
    mask_L = torch.rand(L, generator=generator) < 0.7
    mask_L[[20, L - 1]] = False
    return {
        "hidden_LD": torch.randint(-3, 4, (L, D), generator=generator).float(),
        "head": Head(torch.randint(-1, 2, (V, D), generator=generator).float()),
        "input_ids_L": torch.randint(V, (L,), generator=generator),
        "position_ids_L": torch.cat([torch.arange(21), torch.arange(L - 21)]),
        "loss_mask_L": mask_L,
        "seed": 3,
    }


def check_same(found: Any, expected: Any) -> None:
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), field.name


def changed(name: str, places: Any, value: Any) -> dict[str, Any]:
    """The sample with other values in some places of one of its tensors."""
    given = sample()
    given[name] = given[name].clone()
    given[name][places] = value
    return given


def entropies(logits_NV: Tensor) -> Tensor:
    return torch.special.entr(logits_NV.double().softmax(-1)).sum(-1)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_chunks_do_not_matter(scheme: schemes.AnyScheme) -> None:
    expected = extract(**sample(), scheme=scheme, chunk_size=10**6)
    for chunk_size in (1, 7, 32):
        check_same(extract(**sample(), scheme=scheme, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_what_the_mask_hides_has_no_influence(scheme: schemes.AnyScheme) -> None:
    hidden = ~sample()["loss_mask_L"]
    assert hidden.sum() > 10
    expected = extract(**sample(), scheme=scheme)
    check_same(extract(**changed("hidden_LD", hidden, torch.nan), scheme=scheme), expected)


@pytest.mark.parametrize("scheme", [VAROPT, ALL[2]], ids=lambda scheme: scheme.name)
def test_random_numbers_belong_to_places_not_to_ranks(scheme: schemes.AnyScheme) -> None:
    """With fewer positions in the mask the others' targets stay what they were."""
    whole: Any = extract(**sample(), scheme=scheme)
    fewer = changed("loss_mask_L", slice(0, 30), False)
    some: Any = extract(**fewer, scheme=scheme)
    kept = len(some.heads_N)
    assert 10 < kept < len(whole.heads_N)
    entries = len(some.ids_T)
    assert np.array_equal(some.ids_T, whole.ids_T[-entries:])
    assert np.array_equal(some.codes_C, whole.codes_C[-len(some.codes_C) :])
    assert np.array_equal(some.further_DA, whole.further_DA[:, whole.further_DA.shape[1] - some.further_DA.shape[1] :])


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_the_scalars_are_of_the_true_next_token(scheme: schemes.AnyScheme) -> None:
    """A table of logits by hand: at place t the hidden state is the row that gives the logits of t."""
    given = sample()
    logits_LV = given["head"](given["hidden_LD"]).double()
    found: Any = extract(**given, scheme=scheme)
    surprisal, entropy = [], []
    for place in given["loss_mask_L"].nonzero()[:, 0].tolist():
        next_id = int(given["input_ids_L"][place + 1])
        surprisal.append(-logits_LV[place].log_softmax(-1)[next_id].item())
        entropy.append(entropies(logits_LV[place]).item())
    assert len(set(np.round(surprisal, 2))) > 10
    np.testing.assert_allclose(found.surprisal_N / 64, surprisal, atol=1 / 128 + 1e-4)
    np.testing.assert_allclose(found.entropy_N / 64, entropy, atol=1 / 128 + 1e-4)


def test_next_ids_of_a_batch() -> None:
    ids_BL = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    mask_BL = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert next_ids(ids_BL, mask_BL).tolist() == [11, 13, 22, 23]
    assert next_ids(ids_BL[0], mask_BL[0]).tolist() == [11, 13]


@pytest.mark.parametrize("scheme", ALL[:4], ids=lambda scheme: scheme.name)
def test_temperature_divides_the_logits(scheme: schemes.AnyScheme) -> None:
    softened = sample()
    softened["hidden_LD"] = softened["hidden_LD"] / 2
    check_same(extract(**sample(), scheme=scheme, temperature=2.0), extract(**softened, scheme=scheme))
    assert not np.array_equal(
        extract(**sample(), scheme=scheme, temperature=2.0).entropy_N, extract(**sample(), scheme=scheme).entropy_N
    )


def test_temperature_leaves_hidden_states_and_softens_their_scalars() -> None:
    scheme = ALL[-1]
    cold: Any = extract(**sample(), scheme=scheme)
    warm: Any = extract(**sample(), scheme=scheme, temperature=2.0)
    assert np.array_equal(cold.bits_ND, warm.bits_ND)
    given = sample()
    logits_NV = given["head"](given["hidden_LD"][given["loss_mask_L"]])
    np.testing.assert_allclose(warm.entropy_N / 64, entropies(logits_NV / 2), atol=1 / 128 + 1e-4)


def test_hidden_states_come_back() -> None:
    given = sample()
    stored: Any = extract(**given, scheme=ALL[-1])
    states_ND = torch.from_numpy(stored.bits_ND.view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(states_ND.float(), given["hidden_LD"][given["loss_mask_L"]])  # small whole numbers are exact


@pytest.mark.parametrize("scheme", [VAROPT, ALL[2]], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("name", "value"), [("seed", 4), ("input_ids_L", 1), ("position_ids_L", 0)])
def test_seed_and_content_choose_the_atoms(scheme: schemes.AnyScheme, name: str, value: int) -> None:
    other = {**sample(), name: value} if name == "seed" else changed(name, -1, value)
    expected: Any = extract(**sample(), scheme=scheme)
    found: Any = extract(**other, scheme=scheme)
    assert not np.array_equal(found.ids_T, expected.ids_T)
    assert np.array_equal(found.entropy_N, expected.entropy_N)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_a_sample_without_loss(scheme: schemes.AnyScheme) -> None:
    found: Any = extract(**changed("loss_mask_L", slice(None), False), scheme=scheme)
    expected: Any = extract(**sample(), scheme=scheme)
    for field in fields(expected):
        nothing = getattr(found, field.name)
        assert nothing.size == 0 and nothing.dtype == getattr(expected, field.name).dtype, field.name
        assert nothing.ndim == getattr(expected, field.name).ndim


def test_each_draw_has_the_same_heads_and_other_atoms() -> None:
    found: Any = extract(**sample(), scheme=VAROPT)
    first, second = found.draw(0), found.draw(1)
    assert np.array_equal(first, found.ids_T) and np.array_equal(found.draw(2), first)
    heads_N, counts_N = found.split()
    starts_N = np.cumsum(counts_N) - counts_N
    place_T = np.arange(len(first)) - starts_N.repeat(counts_N)
    is_head_T = place_T < heads_N.repeat(counts_N)
    assert np.array_equal(first[is_head_T], second[is_head_T])
    assert np.array_equal(second[~is_head_T], found.further_DA[0])
    assert (first != second).sum() > 50


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_teacher_that_is_not_finite_is_noticed(scheme: schemes.AnyScheme, bad: float) -> None:
    """Half precision overflows: nothing of that may go into a cache in silence."""
    place = int(sample()["loss_mask_L"].nonzero()[5, 0])
    with pytest.raises(UserError, match=r"finite.*compute_dtype"):
        extract(**changed("hidden_LD", place, bad), scheme=scheme)
