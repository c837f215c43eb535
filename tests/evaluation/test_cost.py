"""Cost of a model: bytes as they are, the peak as allocators count it, and rates of a clock that we wind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.evaluation import cost
from distill.evaluation.cost import LiveTensors, measure_cost, peak_growth, weight_bytes
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import Head
from distill.models.quantization import quantize_linears

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Clocked(nn.Module):
    """A model for which a clock goes ahead by a second for each token of its text, however many rows there are."""

    def __init__(self, largest_batch: int = 8, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 4))
        self.now, self.largest_batch, self.error = 0.0, largest_batch, error
        self.lengths: list[int] = []

    @property
    def head(self) -> Head:
        return Head(self.weight)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        if len(input_ids_BL) > self.largest_batch:
            raise self.error("no room")
        self.lengths.append(input_ids_BL.shape[1])
        self.now += input_ids_BL.shape[1]
        return torch.zeros(*input_ids_BL.shape, 4)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once is enough for tests that do not look at the rates."""
    monkeypatch.setattr(cost, "SECONDS", 0.0)


def measured(model: Any, vocab_size: int = 16, batch_sizes: list[int] | None = None, **options: Any) -> dict[str, Any]:
    return measure_cost(model, vocab_size=vocab_size, device=CPU, batch_sizes=batch_sizes or [1, 4], **options)


def test_rates_are_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clocked()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: model.now)
    monkeypatch.setattr(cost, "SECONDS", 1e9)
    found = measured(model, prompt_tokens=10, new_tokens=5)
    assert found["prefill"] == {"1": 1.0, "4": 4.0}
    # Without a cache the five steps read 11 to 15 tokens, the median 13.
    assert found["decode"] == {"1": pytest.approx(1 / 13), "4": pytest.approx(4 / 13)}
    assert found["kv_cache"] is False and (found["prompt_tokens"], found["new_tokens"]) == (10, 5)
    assert model.lengths == [14, 15] + [*([10] * cost.REPEATS), 11, 12, 13, 14, 15] * 2


def test_memory_is_measured_in_one_round_and_the_others_warm_up_with_the_smallest_batch() -> None:
    model = Clocked()
    found = measured(model, prompt_tokens=10, new_tokens=5, with_memory=False)
    assert "peak_bytes" not in found and found["prefill"].keys() == {"1", "4"}
    assert model.lengths[:2] == [14, 15]


def test_a_slow_model_is_measured_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clocked()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: model.now)
    monkeypatch.setattr(cost, "SECONDS", 9.5)
    found = measured(model, prompt_tokens=10, new_tokens=5)
    assert model.lengths == [14, 15, *[10, 11, 12] * 2]
    assert found["prefill"]["1"] == 1.0


def test_a_batch_that_does_not_fit_is_no_error() -> None:
    found = measured(Clocked(largest_batch=4), batch_sizes=[1, 4, 8], prompt_tokens=6, new_tokens=2)
    assert found["prefill"]["8"] is None and found["decode"]["8"] is None
    assert found["prefill"]["4"] > 0 and found["decode"]["4"] > 0
    fits = measured(Clocked(), batch_sizes=[4], prompt_tokens=6, new_tokens=2)
    assert found["peak_bytes"] == fits["peak_bytes"] > found["weight_bytes"]
    assert json.loads(json.dumps(found)) == found
    nothing = measured(Clocked(largest_batch=0), prompt_tokens=6, new_tokens=2)
    assert "peak_bytes" not in nothing and nothing["decode"] == {"1": None, "4": None}


def test_any_other_error_is_one() -> None:
    with pytest.raises(RuntimeError, match="no room"):
        measured(Clocked(largest_batch=0, error=RuntimeError))


def test_a_short_context_shortens_the_lengths(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("gpt2"))  # 64 learned positions
    found = measured(model, vocab_size=99, batch_sizes=[1, 2])
    assert (found["prompt_tokens"], found["new_tokens"]) == (52, 12)
    assert found["kv_cache"] is True
    assert all(rate > 0 for rates in (found["prefill"], found["decode"]) for rate in rates.values())


def test_bytes_on_disk_are_those_of_the_files(tmp_path: Path) -> None:
    for name, size in (("a", 100), ("b", 23)):
        (tmp_path / name).write_bytes(bytes(size))
    given = {"prompt_tokens": 4, "new_tokens": 2}
    assert measured(Clocked(), weight_files=[tmp_path / "a", tmp_path / "b"], **given)["bytes_on_disk"] == 123
    assert "bytes_on_disk" not in measured(Clocked(), **given)


def test_weights_are_counted_once_and_as_they_lie_in_memory(tiny_model: Any) -> None:
    apart = HuggingFaceLanguageModel(tiny_model("llama", tie_word_embeddings=False))
    tied = HuggingFaceLanguageModel(tiny_model("llama", tie_word_embeddings=True))
    assert weight_bytes(apart) - weight_bytes(tied) == 99 * 32 * 4
    numbers = [*apart.parameters(), *apart.buffers()]
    in_memory = {tensor.data_ptr(): tensor.numel() * 4 for tensor in numbers}
    assert weight_bytes(apart) == sum(in_memory.values())
    assert weight_bytes(apart.to(torch.bfloat16)) < sum(in_memory.values()) * 0.51


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_are_counted_packed_and_with_their_scales(quantization: Any, tiny_model: Any) -> None:
    def bytes_of(layers: int) -> int:
        """512 inputs and outputs, so that each matrix has whole blocks."""
        model = tiny_model("llama", num_hidden_layers=layers, hidden_size=512, num_key_value_heads=4, head_dim=128)
        quantize_linears(model, quantization, torch.float32, "cpu")
        return weight_bytes(HuggingFaceLanguageModel(model))

    matrices = 4 * 512 * 512 + 3 * 512 * 48
    norms = 2 * 512 * 4
    if quantization == "int8":
        expected = matrices + (4 * 512 + 2 * 48 + 512) * 4  # a float32 scale a row
    else:
        blocks = matrices // 64  # an 8-bit scale for 64 weights, and a float32 one for 256 of these (rounded up)
        nested = (4 * (512 * 512 // 64 // 256) + 3 * -(-512 * 48 // 64 // 256)) * 4
        tables = 7 * (16 + 256 + 1) * 4  # each matrix has its two code tables and an offset
        expected = matrices // 2 + blocks + nested + tables
    assert bytes_of(2) - bytes_of(1) == expected + norms


def test_live_tensors_are_counted_from_birth_to_death() -> None:
    before = torch.zeros(1000)
    with LiveTensors(CPU) as live:
        view = before[10:].view(2, -1)  # what was there, views of it and work in place cost nothing
        before.add_(1)
        assert (live.bytes, live.peak) == (0, 0)
        first = before + 1
        assert live.bytes == 4000
        elsewhere = torch.empty(1000, device="meta") + 1
        second = torch.cat([first, first])
        part = second[:10]
        assert (live.bytes, live.peak) == (12000, 12000)
        del second
        assert live.bytes == 12000, "a view keeps its storage"
        del part, first
        assert (live.bytes, live.peak) == (0, 12000)
        del view, elsewhere


def test_the_peak_holds_the_cache_and_grows_with_the_batch(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("llama"))
    ids_BL = torch.arange(8 * 40).reshape(8, 40) % 99
    with torch.no_grad():
        growths = [peak_growth(model, ids_BL[:rows], 99) for rows in (1, 8)]
    cache = 2 * 2 * 2 * 8 * 40 * 4  # layers, keys and values, key-value heads, head size, tokens, float32
    activations = 40 * (2 * 48 + 32) * 4  # gate, up and residual
    assert growths[0] > cache / 2 + activations
    assert 7 < growths[1] / growths[0] < 8.5
