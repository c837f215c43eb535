"""Texts written together: those that a model writes alone, whatever stands beside them and ends before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.generation import authors
from distill.generation.authors import Answer, Asked, LocalAuthor
from distill.generation.sampling import Sampling
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import Head

pytestmark = pytest.mark.usefixtures("one_thread")
STOP = frozenset({5, 17, 40, 77})
ASKED = [
    Asked([1 + (7 * row + place) % 90 for place in range(length)], row, 0) for row, length in enumerate((9, 2, 5, 5, 3))
]


class Plain(torch.nn.Module):
    """A model without a cache."""

    def __init__(self, model: HuggingFaceLanguageModel) -> None:
        super().__init__()
        self.inner = model
        self.max_position_embeddings = 64

    @property
    def head(self) -> Head:
        return self.inner.head

    def body(self, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.inner.body(input_ids_BL, position_ids_BL)


def author(model: Any, **options: Any) -> LocalAuthor:
    given = {"sampling": Sampling(temperature=2.0, seed=1), "max_new_tokens": 20, "batch_size": 5, **options}
    return LocalAuthor(model, vocab_size=99, stop_ids=STOP, **given)


def ignored(answer: Answer) -> None: ...


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "mamba2"])
def test_together_and_alone_the_same_texts_are_written(tiny_model: Any, family: str) -> None:
    model = HuggingFaceLanguageModel(tiny_model(family))
    alone = author(model, batch_size=1).write(ASKED, ignored)
    reported: list[Answer] = []
    assert author(model).write(ASKED, reported.append) == alone
    assert sorted(map(str, reported)) == sorted(map(str, alone)), "each text once"
    assert author(Plain(model)).write(ASKED, ignored) == alone, "without a cache"
    assert len({len(answer.ids) for answer in alone}) > 2, "some end early"
    for answer in alone:
        assert answer.ended == (answer.ids[-1] in STOP) and not STOP & set(answer.ids[:-1])
        assert answer.ended or len(answer.ids) == 20


def test_a_recurrent_family_is_never_padded_and_others_are(tiny_model: Any) -> None:
    padded = {family: author(HuggingFaceLanguageModel(tiny_model(family)))._pads for family in ("llama", "mamba2")}
    assert padded == {"llama": True, "mamba2": False}


def test_samples_of_a_prompt_differ_and_the_seed_decides(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("llama"))
    asked = [Asked([1, 2, 3], 7, sample) for sample in range(4)]
    first = author(model).write(asked, ignored)
    assert len({tuple(answer.ids) for answer in first}) == 4
    assert author(model, sampling=Sampling(temperature=2.0, seed=2)).write(asked, ignored) != first


def test_a_text_ends_where_the_context_does(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("gpt2"))
    asked = [Asked([1] * 60, 0, 0), Asked([1] * 3, 1, 0)]
    for writer in (author(model), author(Plain(model))):
        writer._stop_ids, writer._most = frozenset(), 100
        assert [len(answer.ids) for answer in writer.write(asked, ignored)] == [4, 61]


def test_a_batch_is_halved_when_memory_runs_out(tiny_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    writer, most = author(HuggingFaceLanguageModel(tiny_model("llama"))), 5
    expected = writer.write(ASKED, ignored)
    begin = authors.CachedTexts.begin

    def limited(self: Any, prompts: list[list[int]]) -> torch.Tensor:
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(self, prompts)

    monkeypatch.setattr(authors.CachedTexts, "begin", limited)
    most = 2
    assert writer.write(ASKED, ignored) == expected and writer.batch_size == 2
    assert "out of memory with 5 texts at once; from here on 3" in capsys.readouterr().out
    most = 0
    with pytest.raises(UserError, match="out of memory"):
        writer.write(ASKED, ignored)
