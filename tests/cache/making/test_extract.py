"""From hidden states to stored targets: the right next token, the same in any chunks, blind to what the mask hides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.cache.format.records import Record
from distill.cache.making.extract import Scratch, distributions, extract
from distill.errors import UserError
from distill.models.language_model import Head
from distill.targets import schemes
from distill.targets.next_token import next_ids

L, D, V = 61, 8, 409
VAROPT = schemes.make("varopt", threshold=0.05)
ALL = [
    VAROPT,
    schemes.make("top_k", entries=7),
    schemes.make("random", entries=20),
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


def columns(record: Record) -> dict[str, np.ndarray]:
    """All arrays of a record and its targets, by name; bfloat16 as its bits."""
    named = {**vars(record), **vars(record.targets)}
    arrays = {name: value for name, value in named.items() if isinstance(value, (np.ndarray, Tensor))}
    return {
        name: value.view(torch.int16).numpy() if getattr(value, "dtype", None) == torch.bfloat16 else np.asarray(value)
        for name, value in arrays.items()
    }


def check_same(found: Record, expected: Record, but: str = "") -> None:
    ours, theirs = columns(found), columns(expected)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {but}:
        np.testing.assert_array_equal(ours[name], theirs[name], strict=True, err_msg=name)


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
def test_neither_blocks_nor_memory_that_is_used_again_matter(scheme: schemes.AnyScheme) -> None:
    """Nothing of an earlier sample is left, whether it was longer or shorter."""
    expected = extract(**sample(), scheme=scheme)
    fewer = {**sample(), "loss_mask_L": sample()["loss_mask_L"] & (torch.arange(L) < 30)}
    for block_bytes in (1, 4 * V * 9, 2**20):  # blocks of 8 rows at least, of 9, and one
        scratch = Scratch(block_bytes)
        for given, chunk_size in ((sample(1), 61), (fewer, 17), (sample(), 20), (sample(2), 100), (sample(), 1000)):
            found = extract(**given, scheme=scheme, chunk_size=chunk_size, scratch=scratch)
        check_same(found, expected)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor whose memory is new."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in [*args, *(kwargs or {}).values()] if torch.is_tensor(tensor)
        }
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_sample_takes_new_memory_for_its_logits() -> None:
    """New memory is mapped and zeroed page by page, which costs more than the work in it."""
    scratch = Scratch()
    given = sample()
    extract(**given, scheme=ALL[1], scratch=scratch)
    with Largest() as largest:
        extract(**given, scheme=ALL[1], scratch=scratch)
    assert 0 < largest.elements < int(given["loss_mask_L"].sum()) * V / 2


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-3, 3, 1009)},
    "scale": {"scale": 0.3},
    "soft cap": {"soft_cap": 7.0},
    "all": {"bias_V": torch.linspace(-3, 3, 1009), "scale": 1.7, "soft_cap": 11.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("head", HEADS)
def test_distributions_and_scalars_are_as_exact_as_a_plain_log_softmax(
    head: str, temperature: float, dtype: torch.dtype
) -> None:
    """Against float64, of the same product in the teacher's type; with logits up to some hundreds, and at odd sizes."""
    generator = torch.Generator().manual_seed(5)
    options = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in HEADS[head].items()}
    spread_N1 = torch.logspace(-1, 1.5, 45)[:, None]
    hidden_ND = (torch.randn(45, 24, generator=generator) * spread_N1).to(dtype)
    made = Head(torch.randn(1009, 24, generator=generator).to(dtype), **options)
    true_ids_N = torch.randint(1009, (45,), generator=generator)
    blocks = distributions(hidden_ND, made, true_ids_N, temperature, 30, Scratch(1))
    columns = [(probs_RV.clone(), *scalars_2R) for probs_RV, scalars_2R in blocks]
    assert len(columns) == 4 + 2
    probs_NV, entropy_N, surprisal_N = (torch.cat(column) for column in zip(*columns, strict=True))

    product_NV = made.product(hidden_ND, torch.empty(45, 1009, dtype=dtype))
    exact = (made.transform(product_NV.double()) / temperature).log_softmax(-1)
    plain = (made.transform(product_NV.float()) / temperature).log_softmax(-1)
    at = true_ids_N[:, None]

    def worst(found: Tensor, expected: Tensor) -> float:
        return ((found.double() - expected).abs() / (1 + expected.abs())).max().item()

    pairs = {
        "probabilities": (probs_NV, plain.exp(), exact.exp()),
        "entropy": (entropy_N, -(plain.exp() * plain).sum(-1), -(exact.exp() * exact).sum(-1)),
        "surprisal": (surprisal_N, -plain.gather(1, at)[:, 0], -exact.gather(1, at)[:, 0]),
    }
    for name, (ours, theirs, expected) in pairs.items():
        assert worst(ours, expected) <= max(2 * worst(theirs, expected), 2e-7), name


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
    assert 10 < len(some.entropy_N) < len(whole.entropy_N)
    entries = len(some.targets.ids_T)
    assert torch.equal(some.targets.ids_T, whole.targets.ids_T[-entries:])
    assert torch.equal(some.targets.weights_T, whole.targets.weights_T[-entries:])


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


@pytest.mark.parametrize("scheme", ALL[:3], ids=lambda scheme: scheme.name)
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
    assert torch.equal(cold.targets.hidden_ND, warm.targets.hidden_ND)
    given = sample()
    logits_NV = given["head"](given["hidden_LD"][given["loss_mask_L"]])
    np.testing.assert_allclose(warm.entropy_N / 64, entropies(logits_NV / 2), atol=1 / 128 + 1e-4)


def test_hidden_states_come_back() -> None:
    given = sample()
    stored: Any = extract(**given, scheme=ALL[-1])
    assert torch.equal(
        stored.targets.hidden_ND.float(), given["hidden_LD"][given["loss_mask_L"]]
    )  # small whole numbers are exact


@pytest.mark.parametrize("scheme", [VAROPT, ALL[2]], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("name", "value"), [("seed", 4), ("input_ids_L", 1), ("position_ids_L", 0)])
def test_seed_and_content_choose_the_atoms(scheme: schemes.AnyScheme, name: str, value: int) -> None:
    other = {**sample(), name: value} if name == "seed" else changed(name, -1, value)
    expected: Any = extract(**sample(), scheme=scheme)
    found: Any = extract(**other, scheme=scheme)
    assert not torch.equal(found.targets.ids_T, expected.targets.ids_T)
    assert np.array_equal(found.entropy_N, expected.entropy_N)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_a_sample_without_loss(scheme: schemes.AnyScheme) -> None:
    found: Any = extract(**changed("loss_mask_L", slice(None), False), scheme=scheme)
    expected: Any = extract(**sample(), scheme=scheme)
    some = columns(expected)
    for name, nothing in columns(found).items():
        assert nothing.dtype == some[name].dtype and nothing.ndim == some[name].ndim, name
        assert nothing.size == 0 or name.endswith("_L"), name


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_teacher_that_is_not_finite_is_noticed(scheme: schemes.AnyScheme, bad: float) -> None:
    """Half precision overflows: nothing of that may go into a cache in silence."""
    place = int(sample()["loss_mask_L"].nonzero()[5, 0])
    with pytest.raises(UserError, match=r"finite.*compute_dtype"):
        extract(**changed("hidden_LD", place, bad), scheme=scheme)
