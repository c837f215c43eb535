"""Held-out prompts are beginnings of documents, and continuations are what the model's own greedy decoding says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import plugins
from distill.corpus import open_corpus
from distill.evaluation import texts as evaluation_texts
from distill.evaluation.texts import HALF, continue_text, pick_prompts, split_text
from distill.models.generation import decoder, generate
from distill.models.huggingface import HuggingFaceLanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(world: Any) -> Any:
    return AutoTokenizer.from_pretrained(Path(world.folder) / "teacher")


@pytest.fixture(scope="module")
def model(world: Any) -> HuggingFaceLanguageModel:
    return HuggingFaceLanguageModel(AutoModelForCausalLM.from_pretrained(Path(world.folder) / "teacher").eval())


def make_sample(documents: list[list[int]], length: int) -> dict[str, Any]:
    """Documents one behind the other, then padding."""
    ids = [token for document in documents for token in document]
    positions = [at for document in documents for at in range(len(document))]
    padding = length - len(ids)
    mask = [at < len(document) - 1 for document in documents for at in range(len(document))]
    return {
        "input_ids": torch.tensor(ids + [0] * padding),
        "position_ids": torch.tensor(positions + list(range(padding))),
        "loss_mask": torch.tensor(mask + [False] * padding),
    }


def test_prompts_are_beginnings_and_truth_is_what_follows(tokenizer: Any) -> None:
    first, second, third = (
        tokenizer.encode(text)
        for text in ("and so the middle of a text went on and on", "The Congress met in winter", "A short one")
    )
    assert len(first) > 12 and len(second) > 12 and len(third) < 12
    samples = [
        make_sample([third, second], 80),  # a beginning inside the sample
        make_sample([third], 80),  # nothing long enough but the padding
        make_sample([first, third], 80),  # no long beginning: the document that the sample begins in
    ]
    prompts, truth = pick_prompts(samples, tokenizer, 5, prompt_tokens=4, text_tokens=8)
    assert len(prompts) == len(truth) == 2
    assert prompts[0] == tokenizer.decode(second[:4]) and prompts[0] + truth[0] == tokenizer.decode(second[:12])
    assert prompts[1] == tokenizer.decode(first[:4]) and prompts[1] + truth[1] == tokenizer.decode(first[:12])
    assert pick_prompts(samples, tokenizer, 1, prompt_tokens=4, text_tokens=8) == (prompts[:1], truth[:1])
    assert pick_prompts(samples, tokenizer, 0) == ([], [])


def test_prompts_of_a_real_corpus(world: Any, tokenizer: Any) -> None:
    corpus = Path(world.folder) / "corpus.jsonl"
    samples = open_corpus(str(corpus), tokenizer, sequence_length=300, held_out=0.3).held_out
    prompts, truth = pick_prompts(samples, tokenizer, 3, prompt_tokens=20, text_tokens=30)
    assert len(prompts) == 3
    text = corpus.read_text(encoding="utf-8").encode().decode("unicode_escape", errors="ignore")
    for prompt, behind in zip(prompts, truth, strict=True):
        assert f'"{prompt}{behind}' in text, "the beginning of a passage"


def test_no_half_characters_wherever_the_border_is(tokenizer: Any) -> None:
    text = "naïve 日本語 😀 end"
    ids = tokenizer.encode(text)
    for border in range(len(ids) + 1):
        before, behind = split_text(tokenizer, ids, border)
        assert before + behind == text
        assert HALF not in before + behind
    cut = split_text(tokenizer, ids[: len(tokenizer.encode("naïve 日")) - 1], 3)
    assert "".join(cut) == "naïve "


def test_continuations_are_the_models_own(model: Any, tokenizer: Any) -> None:
    prompts = ["The Congress of the", "I have", "It is a", "The people of the"]
    assert len({len(tokenizer.encode(prompt)) for prompt in prompts}) < len(prompts), "some go together"
    found = continue_text(model, tokenizer, prompts, new_tokens=12)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        theirs = model.model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=[0, 2], pad_token_id=0)
        whole = tokenizer.decode(theirs[0], skip_special_tokens=True)
        assert text == whole[len(prompt) :].rstrip(HALF) and whole.startswith(prompt)


def test_rows_stop_for_themselves(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["The Congress", "I have now", "The people"]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    length = min(len(ids) for ids in encoded)
    prompts = [tokenizer.decode(ids[:length]) for ids in encoded]
    free = [list(generate(model, ids[:length], 12, vocab_size=len(tokenizer))) for ids in encoded]
    stop = free[0][3]
    monkeypatch.setattr("distill.evaluation.texts.ending_tokens", lambda *_: frozenset([stop]))
    found = continue_text(model, tokenizer, prompts, new_tokens=12)
    for prompt, text, ids in zip(prompts, found, free, strict=True):
        kept = ids[: ids.index(stop)] if stop in ids else ids
        expected = tokenizer.decode(tokenizer.encode(prompt) + kept, skip_special_tokens=True)
        assert prompt + text == expected.rstrip(HALF)
    assert len(found[0]) < len(tokenizer.decode(free[0], skip_special_tokens=True))


def test_a_student_of_any_architecture_goes_on(tokenizer: Any) -> None:
    torch.manual_seed(0)
    options = {"vocab_size": len(tokenizer), "hidden_size": 32, "layers": 2, "heads": 4}
    student = plugins.build("compact", "student", options, {}).eval()
    found = continue_text(student, tokenizer, ["The Congress of the", "I have"], new_tokens=8)
    assert len(found) == 2 and any(found)
    student.max_position_embeddings = len(tokenizer.encode("The Congress of the")) + 1
    shorter = continue_text(student, tokenizer, ["The Congress of the"], new_tokens=8)
    assert found[0].startswith(shorter[0]) and len(shorter[0]) < len(found[0]), "up to the end of the context"


def test_out_of_memory_halves_the_texts_at_once_and_goes_on(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [tokenizer.decode([token] * 4) for token in (260, 270, 280, 290, 300)]
    prompts = [prompt for prompt in prompts if len(tokenizer.encode(prompt)) == 4]
    assert len(prompts) >= 3
    whole, sizes = continue_text(model, tokenizer, prompts, new_tokens=6), []

    def decoder_of_little_room(*arguments: Any) -> Any:
        decode = decoder(*arguments)

        def one_at_most(ids_BL: Any) -> Any:
            sizes.append(len(ids_BL))
            if len(ids_BL) > 1:
                raise torch.OutOfMemoryError("no room")
            return decode(ids_BL)

        return one_at_most

    monkeypatch.setattr(evaluation_texts, "decoder", decoder_of_little_room)
    assert continue_text(model, tokenizer, prompts, new_tokens=6) == whole
    assert max(sizes) == len(prompts) and "out of memory" in capsys.readouterr().out
