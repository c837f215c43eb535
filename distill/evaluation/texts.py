"""Held-out prompts and each model's continuations of them, for a reader to see.

Shapes: B batch, L sequence length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.models.generation import HALF, decode_text, decoder, encode_prompt, ending_tokens, room, sample
from distill.models.language_model import LanguageModel
from distill.models.micro_batches import in_halves
from distill.models.tokenizers import vocab_size

PROMPT_TOKENS = 32
"""Tokens of a document that make a prompt."""


def pick_prompts(
    samples: Dataset, tokenizer: Any, count: int, *, prompt_tokens: int = PROMPT_TOKENS, text_tokens: int = 48
) -> tuple[list[str], list[str]]:
    """Pick prompts and their true continuations as text, from the first samples that have a document long enough.

    A sample gives one at most: from the first document that begins in it, or, if none is long enough, from the document
    that was under way at its beginning. Special tokens (a conversation's turns) do not show in the texts. There are
    fewer than `count` if the samples have no more. `tokenizer` is the one that made the samples.
    """
    prompts, truth = [], []
    for index in range(len(samples) if count else 0):  # type: ignore[arg-type]  # a Dataset of map style has a length
        ids = _long_document(samples[index], prompt_tokens + text_tokens)
        if ids is None:
            continue
        before, behind = split_text(tokenizer, ids, prompt_tokens)
        if before.strip() and behind.strip():
            prompts.append(before)
            truth.append(behind)
        if len(prompts) == count:
            break
    return prompts, truth


def _long_document(sample: dict[str, Tensor], tokens: int) -> list[int] | None:
    """Return the first `tokens` ids of a document in the sample, or None if no document is so long."""
    is_start_L = sample["position_ids"] == 0
    starts = [*is_start_L.nonzero().flatten().tolist(), len(is_start_L)]
    # A sample's first document may have begun in the sample before; padding looks like a document without loss.
    for start, end in [*pairwise(starts[1:]), (starts[0], starts[1])]:
        if end - start >= tokens and bool(sample["loss_mask"][start:end].any()):
            return sample["input_ids"][start : start + tokens].tolist()
    return None


def split_text(tokenizer: Any, ids: Sequence[int], prompt_tokens: int) -> tuple[str, str]:
    """Return the text of the first tokens, and the text that the others add to it."""
    whole = decode_text(tokenizer, ids)
    # A character that lies across the border belongs to the continuation.
    before = decode_text(tokenizer, ids[:prompt_tokens]).rstrip(HALF)
    while not whole.startswith(before):
        before = before[:-1]
    return before, whole[len(before) :].rstrip(HALF)


def continue_text(model: LanguageModel, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int = 48) -> list[str]:
    """Return the greedy continuation of each prompt, without the prompt, up to the end of the model's text or answer.

    The prompts are encoded by `tokenizer`, which is the model's own. The model must be in evaluation mode. Raises
    UserError for a prompt longer than its context.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    written = continue_tokens(model, encoded, new_tokens, vocab_size(tokenizer), ending_tokens(model, tokenizer))
    return [split_text(tokenizer, [*ids, *new], len(ids))[1] for ids, new in zip(encoded, written, strict=True)]


def continue_tokens(
    model: LanguageModel, prompts: Sequence[list[int]], new_tokens: int, size: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    """Return the greedy continuation of each prompt in tokens below `size`, without the stopping one.

    Prompts of one length are continued together. The model must be in evaluation mode. Raises UserError for a prompt
    longer than its context.
    """
    same_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        same_length[len(ids)].append(index)
    found: list[list[int]] = [[] for _ in prompts]
    for indices in same_length.values():
        some = [prompts[index] for index in indices]
        written = in_halves(some, lambda few: _greedy(model, few, new_tokens, size, stop_ids))
        for index, ids in zip(indices, written, strict=True):
            found[index] = ids
    return found


@torch.no_grad()
def _greedy(
    model: LanguageModel, prompts: list[list[int]], new_tokens: int, size: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    """Return the new tokens after each of several prompts of one length, without the stopping ones."""
    decode, device = decoder(model, size), model.head.weight_VD.device
    written: list[list[int]] = [[] for _ in prompts]
    is_done = [False] * len(prompts)
    ids_BL = torch.tensor(prompts)
    for _ in range(min(new_tokens, room(model, ids_BL.shape[1]))):
        tokens = [sample(logits_V) for logits_V in decode(ids_BL.to(device))]
        for row, token in enumerate(tokens):
            is_done[row] = is_done[row] or token in stop_ids
            if not is_done[row]:
                written[row].append(token)
        if all(is_done):
            break
        ids_BL = torch.tensor(tokens)[:, None]
    return written
