"""Our models behind lm-eval's interface: the scores of lm-eval's own Hugging Face model, request by request."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from distill.errors import UserError
from distill.evaluation import harness
from distill.evaluation.harness import HarnessModel, longest_text, sampling
from distill.models.huggingface import HuggingFaceLanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that reads 64 tokens, its head with 13 padding rows, and a tokenizer of 400."""
    return world.save_teacher(tmp_path_factory.mktemp("model") / "llama", "llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def texts(world: Any) -> list[str]:
    with open(world.folder / "corpus.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """lm-eval's own model of the folder."""
    from lm_eval.models.huggingface import HFLM

    with contextlib.redirect_stderr(io.StringIO()):
        return HFLM(pretrained=str(folder), device="cpu", batch_size=4)


def model_of(folder: Path) -> HuggingFaceLanguageModel:
    from transformers import AutoModelForCausalLM

    return HuggingFaceLanguageModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()


def ours(folder: Path, model: Any = None, **options: Any) -> HarnessModel:
    from transformers import AutoTokenizer

    model = model_of(folder) if model is None else model
    given = {"vocab_size": len(model.head.weight_VD), "max_length": CONTEXT, "batch_size": 4}
    device = torch.device("cpu")
    return HarnessModel(model, AutoTokenizer.from_pretrained(folder), device=device, **{**given, **options})


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("task", index, 1))
        for index, each in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def pairs(folder: Path, texts: list[str]) -> list[tuple[str, str]]:
    """Contexts and continuations of every sort that lm-eval treats apart."""
    greedy = ours(folder).generate_until(
        requests("generate_until", *((text[:60], {"until": [], "max_gen_toks": 2}) for text in texts[:8]))
    )
    return [
        *((text[:cut], text[cut : cut + 30]) for text, cut in zip(texts, range(5, 120, 7), strict=False)),
        *((text[:40], answer) for text in texts[:2] for answer in (" a", " b", " of", " the people")),  # shared input
        *((text[:60], answer) for text, answer in zip(texts, greedy, strict=False)),  # some are the likeliest tokens
        ("", texts[0][:20]),
        ("<|end|>", texts[0][:20]),
        (texts[1][:25] + "  ", "the blanks belong to the continuation"),
        (texts[2], " a context that is too long for the model"),
        (texts[3], texts[4][:90]),
    ]


def test_log_likelihoods_are_lm_evals_own(
    folder: Path, theirs: Any, pairs: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    mine, expected = ours(folder), theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = mine.loglikelihood(requests("loglikelihood", *pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in found} == {True, False}
    assert mine.cut == sum("from the left" in message for message in caplog.messages) > 0


def test_rolling_log_likelihoods_are_lm_evals_own(folder: Path, theirs: Any, texts: list[str]) -> None:
    whole = [(text,) for text in (*texts[:5], "short", texts[5] + texts[6], "<|end|>" + texts[7][:50])]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *whole), disable_tqdm=True)
    found = ours(folder).loglikelihood_rolling(requests("loglikelihood_rolling", *whole))
    assert found == pytest.approx(expected, rel=1e-6)


def test_generated_texts_are_lm_evals_own(folder: Path, theirs: Any, texts: list[str]) -> None:
    settings = {"until": ["e"], "max_gen_toks": 12}
    plain = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    asked = [
        (text[:cut], each) for text, cut in zip(texts, (5, 40, 80, 290), strict=False) for each in (settings, plain)
    ]
    expected = theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    mine = ours(folder)
    found = mine.generate_until(requests("generate_until", *asked))
    assert found == expected
    assert all("e" not in text for text in found[::2]) and any(found)
    assert any("e" in text for text in found[1::2])  # so that the stop string had something to do
    assert mine.cut == 2


def test_padding_rows_take_no_part(folder: Path, pairs: list[tuple[str, str]]) -> None:
    mine = ours(folder, vocab_size=400)
    context, continuation = pairs[3]
    ((found, _),) = mine.loglikelihood(requests("loglikelihood", (context, continuation)))
    ids, more = mine._encode_pair(context, continuation)
    with torch.no_grad():
        logits_LV = mine.model.model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].double()
    of_next = torch.tensor(more)[:, None]
    assert found == pytest.approx(float(logits_LV[:, :400].log_softmax(-1).gather(-1, of_next).sum()), rel=1e-6)
    assert found > float(logits_LV.log_softmax(-1).gather(-1, of_next).sum()) + 1e-3  # as if 413 were tokens


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_do_not_depend_on_what_is_computed_together(
    folder: Path, pairs: list[tuple[str, str]], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ours(folder).loglikelihood(requests("loglikelihood", *pairs))
    monkeypatch.setattr(harness, "LOGITS_AT_A_TIME", 413 * 33)  # several chunks, of which the last has few rows
    found = ours(folder, batch_size=batch_size).loglikelihood(requests("loglikelihood", *pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_equal_inputs_are_read_once(folder: Path) -> None:
    mine = ours(folder, batch_size=1)
    reads = []
    body = mine.model.body

    def counting(ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
        reads.append(ids_BL.shape)
        return body(ids_BL, positions_BL)

    mine.model.body = counting  # type: ignore[method-assign]
    found = mine.loglikelihood(requests("loglikelihood", *(("Is it so?", answer) for answer in ("a", "b", "c", "a"))))
    assert len(reads) == 1 and found[0] == found[3] != found[1]


class Plain(torch.nn.Module):
    """A model of no family: body and head of another, which does not say what it can read."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    @property
    def head(self) -> Any:
        return self.inner.head

    def body(self, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.inner.body(input_ids_BL, position_ids_BL)


def test_any_body_and_head_will_do(folder: Path, pairs: list[tuple[str, str]], texts: list[str]) -> None:
    expected, plain = ours(folder), ours(folder, Plain(model_of(folder)))
    scored = requests("loglikelihood", *pairs)
    assert plain.loglikelihood(scored) == expected.loglikelihood(scored)
    asked = requests("generate_until", (texts[0][:50], {"until": ["."], "max_gen_toks": 9}))
    assert plain.generate_until(asked) == expected.generate_until(asked)


def test_the_longest_text_is_the_models_own_or_the_given(folder: Path) -> None:
    assert longest_text(model_of(folder), None, otherwise=7) == CONTEXT
    plain: Any = Plain(None)
    assert longest_text(plain, None, otherwise=7) == 7
    plain.max_position_embeddings = 9
    assert longest_text(plain, None, otherwise=7) == 9


def test_sampling_settings() -> None:
    assert sampling({}) == sampling({"do_sample": False, "temperature": 0.0, "top_p": 0.9, "num_beams": 1}) == {}
    assert sampling({"do_sample": True, "temperature": 0.7}) == {"temperature": 0.7, "top_p": 1.0}
    with pytest.raises(UserError, match="num_beams"):
        sampling({"num_beams": 4})
    with pytest.raises(UserError, match="top_k"):
        sampling({"do_sample": True, "temperature": 0.7, "top_k": 50})
    with pytest.raises(UserError, match="temperature"):
        sampling({"do_sample": True})


def test_sampled_texts_come_from_the_seed(folder: Path, texts: list[str]) -> None:
    asked = [(text[:40], {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}) for text in texts[:4]]
    found = [ours(folder, seed=seed).generate_until(requests("generate_until", *asked)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_what_cannot_be_answered_is_refused(folder: Path, texts: list[str]) -> None:
    mine = ours(folder)
    with pytest.raises(UserError, match=r"continuation of .* takes 1 to 64"):
        mine.loglikelihood(requests("loglikelihood", ("a", texts[0] + texts[1])))
    with pytest.raises(UserError, match="generates 64 tokens"):
        mine.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": CONTEXT})))


def test_the_probabilities_of_all_next_tokens_are_one(folder: Path) -> None:
    mine = ours(folder, vocab_size=400)
    scores = mine._loglikelihood_tokens([(None, [5, 6, 7], [token]) for token in range(400)])
    assert math.fsum(math.exp(value) for value, _ in scores) == pytest.approx(1, abs=1e-5)
    assert sum(is_greedy for _, is_greedy in scores) == 1


def test_out_of_memory_halves_the_passes_and_goes_on(
    folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = requests("loglikelihood", *((text[:20], text[20:60]) for text in texts[:8]))
    whole, model = ours(folder).loglikelihood(asked), model_of(folder)
    body = model.body

    def little_room(input_ids_BL: Any, position_ids_BL: Any) -> Any:
        if len(input_ids_BL) > 1:
            raise torch.OutOfMemoryError("no room")
        return body(input_ids_BL, position_ids_BL)

    monkeypatch.setattr(model, "body", little_room)
    halved = ours(folder, model).loglikelihood(asked)
    assert [score for score, _ in halved] == pytest.approx([score for score, _ in whole], abs=1e-4)
    assert capsys.readouterr().out.count("out of memory") == 2, "from 4 to 2, and from 2 to 1"
