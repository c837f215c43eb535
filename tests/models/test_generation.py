"""Generation: with the cache and without the same tokens, those of transformers; sampling follows its law."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from distill import plugins
from distill.errors import UserError
from distill.models import generation
from distill.models.generation import (
    context_length,
    decode_text,
    decoder,
    encode_prompt,
    ending_tokens,
    generate,
    has_cache,
    sample,
)
from distill.models.huggingface import HuggingFaceLanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt2", {}),
    ("gemma3_text", {"sliding_window": 5}),  # shorter than the prompt, so that the cache forgets
    ("qwen3", {}),
    ("mamba2", {}),
    ("rwkv", {}),  # whose state transformers calls otherwise: it reads everything again
]
PROMPT = [5, 17, 3, 88, 41, 2, 60, 33, 9]


@pytest.fixture
def compact() -> Any:
    torch.manual_seed(0)
    return plugins.build(
        "compact", "student", {"vocab_size": 99, "hidden_size": 32, "layers": 2, "heads": 4}, {}
    ).eval()


def without_cache(model: Any, ids: list[int], new_tokens: int, vocab_size: int = 99) -> tuple[list[int], list[Any]]:
    """The naive program: all logits of the whole text for every token."""
    logits = []
    for _ in range(new_tokens):
        ids_1L = torch.tensor([ids])
        with torch.no_grad():
            all_1LV = model.head(model.body(ids_1L, torch.arange(len(ids))[None]))
        logits.append(all_1LV[0, -1, :vocab_size])
        ids = [*ids, int(logits[-1].argmax())]
    return ids[-new_tokens:], logits


@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_the_cache_changes_nothing(family: str, sizes: dict[str, Any], tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model(family, **sizes))
    assert has_cache(model) is (family != "rwkv")
    expected, logits = without_cache(model, PROMPT, 12)
    assert len(set(expected)) > 1
    decode, ids_BL = decoder(model, 99), torch.tensor([PROMPT])
    with torch.no_grad():
        for token, logits_V in zip(expected, logits, strict=True):
            torch.testing.assert_close(decode(ids_BL)[0], logits_V, rtol=0, atol=1e-5)
            ids_BL = torch.tensor([[token]])
    assert list(generate(model, PROMPT, 12, vocab_size=99)) == expected
    theirs = model.model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    assert theirs[0, len(PROMPT) :].tolist() == expected


def test_any_other_model_reads_its_text_again(compact: Any) -> None:
    assert not has_cache(compact)
    assert list(generate(compact, torch.tensor(PROMPT), 12, vocab_size=99)) == without_cache(compact, PROMPT, 12)[0]


@pytest.mark.parametrize("family", ["llama", "mamba2", "compact"])
def test_a_batch_is_its_rows(family: str, tiny_model: Any, compact: Any) -> None:
    model = compact if family == "compact" else HuggingFaceLanguageModel(tiny_model(family))
    ids_BL = torch.randint(0, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    together, alone = decoder(model, 99), [decoder(model, 99) for _ in range(3)]
    with torch.no_grad():
        for part_BL in (ids_BL, ids_BL[:, :1], ids_BL[:, 3:4]):
            expected_BV = torch.cat([decode(part_BL[row : row + 1]) for row, decode in enumerate(alone)])
            torch.testing.assert_close(together(part_BL), expected_BV, rtol=0, atol=1e-5)


def test_padding_rows_never_come(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("llama"))
    with torch.no_grad():  # the likeliest of all
        model.model.get_output_embeddings().weight[80:] = model.model.get_output_embeddings().weight[:19] * 20
    assert max(generate(model, PROMPT, 20, vocab_size=99)) >= 80
    assert max(generate(model, PROMPT, 20, vocab_size=80)) < 80
    drawn = generate(model, PROMPT, 40, vocab_size=80, temperature=5.0, generator=torch.Generator().manual_seed(0))
    assert max(drawn) < 80
    with pytest.raises(ValueError, match="99 rows"):
        list(generate(model, PROMPT, 2, vocab_size=100))


def test_tokens_come_one_by_one(compact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body, lengths = compact.body, []
    monkeypatch.setattr(compact, "body", lambda ids_BL, at_BL: lengths.append(ids_BL.shape[1]) or body(ids_BL, at_BL))
    list(islice(generate(compact, PROMPT, 1000, vocab_size=99), 3))
    assert lengths == [9, 10, 11]
    assert torch.is_grad_enabled()


def test_a_stopping_token_ends_the_text_and_is_not_part_of_it(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("llama"))
    free = list(generate(model, PROMPT, 12, vocab_size=99))
    stop = free[5]
    stopped = list(generate(model, PROMPT, 12, vocab_size=99, stop_ids=frozenset([stop])))
    assert stopped == free[: free.index(stop)]


def test_the_context_is_filled_and_not_overrun(tiny_model: Any, compact: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("gpt2"))  # learned positions: there are no more
    assert (context_length(model), context_length(compact)) == (64, None)
    assert len(list(generate(model, [1] * 60, 100, vocab_size=99))) == 5
    assert len(list(generate(model, [1] * 64, 100, vocab_size=99))) == 1
    assert len(list(generate(compact, [1] * 64, 10, vocab_size=99))) == 10
    compact.max_position_embeddings = 66
    assert len(list(generate(compact, [1] * 64, 10, vocab_size=99))) == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 65, {}, "65 tokens.*64 at most"),
        ([], {}, "no tokens"),
        ([1], {"temperature": -1.0}, "temperature -1"),
        ([1], {"temperature": float("nan")}, "temperature nan"),
        ([1], {"top_p": 0.0}, "top_p 0"),
        ([1], {"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_what_cannot_be_is_refused_at_once(prompt: list[int], options: Any, message: str, tiny_model: Any) -> None:
    with pytest.raises(UserError, match=message):
        generate(HuggingFaceLanguageModel(tiny_model("llama")), prompt, 4, vocab_size=99, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_named(bad: float, temperature: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        sample(torch.tensor([0.0, bad, 1.0]), temperature)


def chi_square(logits_V: torch.Tensor, expected_V: torch.Tensor, temperature: float, top_p: float) -> float:
    """Pearson's statistic of 4,000 draws; tokens that must not come are asserted away."""
    draws, generator = 4000, torch.Generator().manual_seed(3)
    drawn = torch.tensor([sample(logits_V, temperature, top_p, generator) for _ in range(draws)])
    counts_V = drawn.bincount(minlength=len(logits_V)).double()
    possible = expected_V > 0
    assert not counts_V[~possible].any()
    expected = expected_V[possible] * draws
    return float(((counts_V[possible] - expected) ** 2 / expected).sum())


def test_sampling_follows_the_law() -> None:
    probs_V = torch.tensor([0.05, 0.30, 0.02, 0.25, 0.20, 0.18], dtype=torch.float64)
    logits_V = probs_V.log() + 3.0
    assert chi_square(logits_V, probs_V, 1.0, 1.0) < 20.5  # 5 degrees of freedom: exceeded in 1 of 1,000
    hot_V = probs_V.sqrt() / probs_V.sqrt().sum()
    assert chi_square(logits_V, hot_V, 2.0, 1.0) < 20.5
    assert chi_square(logits_V, hot_V, 1.0, 1.0) > 20.5, "the test can tell the two apart"
    nucleus_V = torch.tensor([0, 0.30, 0, 0.25, 0.20, 0], dtype=torch.float64) / 0.75
    assert chi_square(logits_V, nucleus_V, 1.0, 0.7) < 13.8  # 0.30 + 0.25 is not 0.7 yet; 2 degrees of freedom


def test_narrow_sampling_is_greedy(tiny_model: Any) -> None:
    logits_V = torch.tensor([0.1, 2.0, -1.0, 1.9])
    assert {sample(logits_V, 1.0, 1e-9) for _ in range(50)} == {1}
    assert {sample(logits_V, 1e-30) for _ in range(50)} == {1}
    assert {sample(logits_V, 1e-3, generator=torch.Generator().manual_seed(0)) for _ in range(50)} == {1}


def test_a_seed_says_it_all(tiny_model: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("llama"))

    def text(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(generate(model, PROMPT, 20, vocab_size=99, temperature=1.0, top_p=0.95, generator=generator))

    assert text(1) == text(1) != text(2)


def test_ending_tokens(world: Any, tiny_model: Any, tokenizer: Any, compact: Any) -> None:
    chatting = AutoTokenizer.from_pretrained(Path(world.folder) / "teacher")
    end, end_of_turn = chatting.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    assert ending_tokens(compact, chatting) == {end, end_of_turn}
    model = HuggingFaceLanguageModel(tiny_model("llama"))
    model.model.generation_config.eos_token_id = [7, 8]
    assert ending_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id}
    chatting.chat_template = "{{ raise_exception('only the two of us') }}"
    assert ending_tokens(compact, chatting) == {end}
    chatting.chat_template = "{% for m in messages %}{{ m['content'] }} and so on{% endfor %}"
    assert ending_tokens(compact, chatting) == {end}


def test_a_prompt_has_no_end(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    ids = encode_prompt(tokenizer, "the cat")
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert ids == [tokenizer.bos_token_id, *plain]
    assert decode_text(tokenizer, ids) == tokenizer.decode(plain)


def test_the_cache_is_used(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HuggingFaceLanguageModel(tiny_model("llama"))
    forward, lengths = model.model.model.forward, []

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    name = generation.cache_name(model)
    monkeypatch.setattr(generation, "cache_name", lambda _: name)  # the wrapper hides the signature
    monkeypatch.setattr(model.model.model, "forward", counted)
    list(generate(model, PROMPT, 4, vocab_size=99))
    assert lengths == [9, 1, 1, 1]
