"""No leak stays unseen: the future, other rows, other documents, random answers; and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.isolation import Fault, find_fault
from distill.models.language_model import Head
from distill.models.perturbation import SMALL, perturbed
from distill.models.quantization import quantize_linears

V, D = 53, 8


class Model(nn.Module):
    """Hidden states of the token alone, and what `mix(self, hidden_BLD, ids_BL)` adds to them."""

    def __init__(self, mix: Callable[[Any, Tensor, Tensor], Tensor], size: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, size)
        self.linear = nn.Linear(size, size)
        self.wide = nn.Conv1d(size, size, 3, padding=1)
        self.causal = nn.Conv1d(size, size, 3, padding=2)
        self.norm, self.dropout = nn.BatchNorm1d(size), nn.Dropout(0.5)
        self.zero = nn.Parameter(torch.zeros(size, size))
        self.scale = nn.Parameter(torch.full((size,), 1e-6))
        self.state = torch.zeros(())
        self.register_buffer("calls", torch.zeros(()))
        self.mix = mix

    @property
    def head(self) -> Head:
        return Head(self.embedding.weight)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        hidden_BLD = self.embedding(input_ids_BL)
        return hidden_BLD + self.mix(self, hidden_BLD, input_ids_BL)


def convolved(convolution: nn.Conv1d, hidden_BLD: Tensor) -> Tensor:
    return convolution(hidden_BLD.transpose(1, 2)).transpose(1, 2)[:, : hidden_BLD.shape[1]]


def attention(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*(model.linear(hidden_BLD) for _ in range(3)))


def next_token(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    return hidden_BLD.roll(-1, dims=1)


def blocks_of_four(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    """Each position sees all of its block: positions 4 to 7 one another, and nothing else."""
    return hidden_BLD.unflatten(1, (-1, 4)).mean(2, keepdim=True).expand(-1, -1, 4, -1).flatten(1, 2)


def changed_ids(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    ids_BL[:, 0] = 0
    return hidden_BLD


def random_routing(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    chosen_BL1 = torch.randint(0, 2, (*ids_BL.shape, 1))
    return torch.where(chosen_BL1 == 1, model.linear(hidden_BLD), hidden_BLD)


def kept_state(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    model.state = model.state * 0.5 + hidden_BLD.detach().mean()
    return hidden_BLD * model.state


def counted(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    model.calls += 1
    return hidden_BLD * model.calls


def places_by_capacity(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    """An expert that takes every third token of the whole batch, first come, first served, up to a fifth."""
    wanted = ids_BL.flatten() % 3 == 0
    taken_BL1 = (wanted & (wanted.cumsum(0) <= ids_BL.numel() // 5)).view(*ids_BL.shape, 1)
    return model.linear(hidden_BLD) * taken_BL1


LEAKS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], Fault]] = {
    "attention without a mask": (attention, Fault.FUTURE),
    "convolution padded on both sides": (lambda model, x, ids: convolved(model.wide, x), Fault.FUTURE),
    "shift the wrong way": (next_token, Fault.FUTURE),
    "mean over positions": (lambda model, x, ids: x.mean(1, keepdim=True), Fault.FUTURE),
    "blocks": (blocks_of_four, Fault.FUTURE),
    "sum from behind": (lambda model, x, ids: x.flip(1).cumsum(1).flip(1), Fault.FUTURE),
    "behind a zero matrix": (lambda model, x, ids: next_token(model, x, ids) @ model.zero, Fault.FUTURE),
    "behind a layer scale": (lambda model, x, ids: next_token(model, x, ids) * model.scale, Fault.FUTURE),
    "mean over the batch": (lambda model, x, ids: x.mean(0, keepdim=True), Fault.ROWS),
    "norm over the batch": (lambda model, x, ids: (x - x.mean(0)) / (x.std(0) + 1), Fault.ROWS),
    "batch norm": (lambda model, x, ids: model.norm(x.flatten(0, 1)).view_as(x), Fault.ROWS),
    "row above": (lambda model, x, ids: x.roll(1, dims=0), Fault.ROWS),
    "capacity of experts": (places_by_capacity, Fault.ROWS),
    "rows behind zero": (lambda model, x, ids: x.roll(1, dims=0) @ model.zero, Fault.ROWS),
    "ids in place": (changed_ids, Fault.INPUT),
    "random routing": (random_routing, Fault.ANSWERS),
    "dropout left on": (lambda model, x, ids: functional.dropout(x, 0.1), Fault.ANSWERS),
    "dropout behind zero": (lambda model, x, ids: functional.dropout(x, 0.1) @ model.zero, Fault.ANSWERS),
    "state between calls": (kept_state, Fault.ANSWERS),
    "counted calls": (counted, Fault.ANSWERS),
}
SOUND: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "tokens alone": lambda model, x, ids: model.linear(x),
    "sum so far": lambda model, x, ids: x.cumsum(1),
    "convolution of the past": lambda model, x, ids: convolved(model.causal, x),
    "dropout in training": lambda model, x, ids: model.dropout(x.cumsum(1)),
    "noise in training": lambda model, x, ids: x + torch.randn_like(x) * model.training,
    "python's noise in training": lambda model, x, ids: x * (1 + random.random() * model.training),
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("pack", [False, True])
def test_a_leak_is_found(name: str, pack: bool) -> None:
    mix, fault = LEAKS[name]
    assert find_fault(Model(mix), V, "cpu", pack=pack) is fault


@pytest.mark.parametrize("name", [name for name in LEAKS if "zero" not in name and "scale" not in name])
def test_a_leak_is_found_in_long_rows_as_they_are(name: str) -> None:
    mix, fault = LEAKS[name]
    assert find_fault(Model(mix), V, "cpu", pack=False, length=64, perturb=False) is fault


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("length", [2, 3, 12, 31])
def test_a_sound_model_passes(name: str, length: int) -> None:
    for training in (True, False):
        assert find_fault(Model(SOUND[name]).train(training), V, "cpu", pack=False, length=length) is None


def test_a_sum_so_far_runs_over_packed_documents() -> None:
    model = Model(SOUND["sum so far"])
    assert find_fault(model, V, "cpu", pack=True) is Fault.DOCUMENTS
    assert find_fault(model, V, "cpu", pack=True, length=2) is Fault.DOCUMENTS
    assert find_fault(Model(SOUND["dropout in training"]), V, "cpu", pack=True) is Fault.DOCUMENTS
    assert find_fault(Model(SOUND["tokens alone"]), V, "cpu", pack=True) is None


@pytest.mark.parametrize("name", ["sum so far", "dropout in training", "batch norm", "behind a zero matrix", "counted"])
def test_nothing_is_left_behind(name: str) -> None:
    mixes = SOUND | {name: mix for name, (mix, _) in LEAKS.items()} | {"counted": counted}
    model = Model(mixes[name])
    model.dropout.eval()  # a module that its owner keeps in another mode
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    drawn = [torch.get_rng_state(), random.getstate()]
    find_fault(model, V, "cpu")
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mamba2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_families_are_sound_in_training_too(family: str, dtype: torch.dtype, tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model(family).to(dtype)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = find_fault(model, 99, "cpu", pack=True)
    assert found is (Fault.DOCUMENTS if family == "mamba2" else None)
    assert find_fault(model, 99, "cpu", pack=False) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_outliers_of_int8_are_no_leak(tiny_model: Any) -> None:
    original = tiny_model("llama")
    with torch.no_grad():
        for layer in original.model.layers:
            layer.input_layernorm.weight.mul_(10)  # beyond 6, where an activation is an outlier
    quantize_linears(original, "int8", torch.float32, "cpu")
    model = HuggingFaceLanguageModel(original).eval()
    rows = torch.arange(24).view(2, 12), torch.arange(12).expand(2, -1)
    both, alone = model.body(*rows)[0], model.body(rows[0][:1], rows[1][:1])[0]
    assert not torch.allclose(both, alone, rtol=0.01), "outliers of one row are outliers for both"
    assert find_fault(model, 99, "cpu") is None
    assert torch.equal(model.body(*rows)[0], both), "and afterwards they are again"

    own = type(original.model).forward
    original.model.forward = lambda **given: own(
        original.model, **{**given, "input_ids": given["input_ids"].roll(-1, 1)}
    )
    assert find_fault(model, 99, "cpu") is Fault.FUTURE


class Odd(nn.Module):
    """Weights of all kinds: shared, frozen, large with rows and columns that are zero, empty, quantised, on meta."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        large = torch.randn(SMALL // 256 + 9, 256) * 0.02
        large[5], large[7], large[:, 3], large[11, 11] = 0.0, -0.0, 1e-5, float("nan")
        self.large = nn.Parameter(large)
        self.shared = self.large
        self.view = nn.Parameter(self.large.data[:4])
        self.half_ = nn.Parameter(torch.zeros(16, 16, dtype=torch.float16), requires_grad=False)
        self.brain = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(0.0))
        self.none_ = nn.Parameter(torch.empty(0, 4))
        self.bytes_ = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
        self.meta = nn.Parameter(torch.empty(8, 8, device="meta"))

    def bits(self) -> list[bytes]:
        present = (parameter for parameter in self.parameters() if not parameter.is_meta)
        return [parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for parameter in present]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_weights_come_back_bit_for_bit(error: type[BaseException] | None) -> None:
    model = Odd()
    before, addresses = model.bits(), [parameter.data_ptr() for parameter in model.parameters()]
    try:
        with perturbed(model):
            assert model.half_.any(dim=1).all() and model.brain.ne(1).any() and model.scalar != 0
            assert model.large[5].all() and model.large[7].all(), "rows of zeros move"
            assert (model.large[20:, 3] != 1e-5).all(), "so do columns"
            assert model.large[20:, 4:].flatten().tolist() == Odd().large[20:, 4:].flatten().tolist(), "no others"
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert model.bits() == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("training", "passes"), [(False, 2), (True, 4)])
def test_a_sound_model_costs_two_passes_a_mode(training: bool, passes: int) -> None:
    model, calls = Model(SOUND["tokens alone"]).train(training), []
    body = model.body
    model.body = lambda *given: (calls.append(len(given[0])), body(*given))[1]  # type: ignore[method-assign, func-returns-value]
    assert find_fault(model, V, "cpu") is None
    assert calls == [6, 5, *([6] * (passes - 2))], "the second batch is smaller; in training mode dropout forbids it"


def test_a_trained_matrix_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B teacher in 4 bits has an embedding and a head of a gigabyte each that are not quantised."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(SMALL // 16, 64), nn.Linear(64, SMALL // 16), nn.LayerNorm(64)])
    nn.init.normal_(model[0].weight, std=0.02)
    with torch.no_grad():
        model[0].weight[3] = 0  # the padding token's row
    kept = []
    clone, select = Tensor.clone, Tensor.index_select
    monkeypatch.setattr(Tensor, "clone", lambda tensor: kept.append(tensor.nbytes) or clone(tensor))
    monkeypatch.setattr(Tensor, "index_select", lambda *given: kept.append(select(*given).nbytes) or select(*given))
    with perturbed(model):
        assert model[0].weight[3].all()
    assert sum(kept) < 0.05 * sum(parameter.nbytes for parameter in model.parameters())


def test_a_model_that_noise_drives_beyond_its_type_is_measured_without() -> None:
    def huge(model: Any, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
        return hidden_BLD.cumsum(1) * (1 + model.zero.abs().sum() * 1e6)

    model = Model(huge).half().eval()
    with perturbed(model):
        assert not model.body(torch.arange(12)[None], torch.arange(12)[None]).isfinite().all()
    assert find_fault(model, V, "cpu", pack=False) is None
    assert find_fault(model, V, "cpu", pack=True) is Fault.DOCUMENTS


@pytest.mark.parametrize("seed", range(3))
def test_rounding_in_16_bits_is_no_leak(seed: int, one_thread: None) -> None:
    """Such deep, large weights make much of any rounding: of the kernels that read documents by themselves, say."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        initializer_range=0.5,
    )
    model = HuggingFaceLanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval())
    with torch.autocast("cpu", torch.bfloat16):
        assert find_fault(model, 99, "cpu", length=128, perturb=False) is None
