"""Texts that a model wrote itself: its distance from the teacher on its own prefixes, endings, repetition, answers.

Shapes: N written tokens, L sequence length, S texts, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.evaluation.metrics import log_probabilities
from distill.evaluation.statistics import ratio_intervals
from distill.models.vocabulary import Vocabulary, trim_head

if TYPE_CHECKING:
    from distill.evaluation.fidelity import TeacherStates

Metric = Callable[[str, str], float]
"""Function of an answer and its reference: a number, larger or smaller is better as its maker likes."""

EDGES = (0, 8, 32, 128, 512, 2048)
"""Numbers of written tokens before a position at which a new bin begins."""
_NGRAM = 4


@dataclass(frozen=True)
class Question:
    """The beginning of a held-out document, and what follows it there."""

    ids: list[int]
    """Tokens to write on from, in the teacher's numbers."""
    reference: list[int]
    """Tokens that follow in the document."""
    is_answer: bool
    """True if the whole reference is one answer, and not the rest of a plain text."""


@dataclass(frozen=True)
class Written:
    """One text that a model wrote."""

    ids: list[int]
    """New tokens in the teacher's numbers, with the one that ended the text."""
    ended: bool
    answer: str
    reference: str | None
    """Text of the reference, if it is an answer."""


def pick_questions(samples: Dataset, count: int, prompt_tokens: int) -> list[Question]:
    """Return at most `count` questions, one a document, from samples in order.

    A document whose beginning carries no loss is a conversation, or a text behind its prompt: its last stretch with
    loss is the answer that is asked for. Any other is a plain text: its first `prompt_tokens` tokens ask for more.
    """
    found: dict[int, Question] = {}
    for index in range(len(samples)):  # type: ignore[arg-type]  # a Dataset of map style has a length
        if len(found) >= count:
            break
        sample = samples[index]
        hashes_L = sample["document_hash"]
        starts = [*(sample["position_ids"] == 0).nonzero().flatten().tolist(), len(hashes_L)]
        for start, end in itertools.pairwise(starts):
            document = int(hashes_L[start])
            if document in found or len(found) >= count:
                continue
            question = _question(sample, start, end, prompt_tokens)
            if question is not None:
                found[document] = question
    return list(found.values())


def _question(sample: dict[str, Tensor], start: int, end: int, prompt_tokens: int) -> Question | None:
    """Return the question of a sample's part, or None. A position with loss predicts the token behind it."""
    ids, learned = sample["input_ids"][start:end].tolist(), sample["loss_mask"][start:end].nonzero().flatten().tolist()
    if not learned:
        return None
    if learned[0] == 0:
        cut = min(prompt_tokens, len(ids) - 1)
        return Question(ids[:cut], ids[cut:], is_answer=False) if cut >= 1 else None
    last = first = learned[-1]
    has_loss = set(learned)
    while first - 1 in has_loss:
        first -= 1
    return Question(ids[: first + 1], ids[first + 1 : last + 2], is_answer=True)


def as_samples(questions: Sequence[Question], texts: Sequence[Written], vocabulary: Vocabulary | None) -> list[Any]:
    """Return each question with its text as a sample with loss on the written tokens, padded to one length.

    With a `vocabulary` they are in the numbers of the student that has these tokens.
    """
    length = max(len(question.ids) + len(text.ids) for question, text in zip(questions, texts, strict=True))
    samples = []
    for question, text in zip(questions, texts, strict=True):
        ids_L = torch.tensor([*question.ids, *text.ids])
        ids_L = ids_L if vocabulary is None else vocabulary.mapped(ids_L)
        mask_L = torch.zeros(length, dtype=torch.bool)
        mask_L[len(question.ids) - 1 : len(ids_L) - 1] = True
        padded_L = torch.nn.functional.pad(ids_L, (0, length - len(ids_L)))
        samples.append({"input_ids": padded_L, "position_ids": torch.arange(length), "loss_mask": mask_L})
    return samples


@torch.no_grad()
def own_divergences(
    student: TeacherStates,
    teacher: TeacherStates,
    chunk_size: int,
    device: torch.device,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """Return KL(student‖teacher) `= Σ q (log q − log p)` of each written token, `[N]` float64 on the host, in nats.

    Both states are of the same texts. With a `vocabulary` both distributions are over its tokens alone.
    """
    teacher_head = (teacher.head if vocabulary is None else trim_head(teacher.head, vocabulary)).to(device)
    student_head, found = student.head.to(device), [torch.empty(0, dtype=torch.float64)]
    for student_ND, teacher_ND in zip(student.hidden, teacher.hidden, strict=True):
        for own_CD, their_CD in zip(student_ND.split(chunk_size), teacher_ND.split(chunk_size), strict=True):
            logq_CV = log_probabilities(student_head(own_CD.to(device)).float())
            logp_CV = log_probabilities(teacher_head(their_CD.to(device)).float())
            divergence_C = (logq_CV.exp() * (logq_CV - logp_CV).nan_to_num(nan=0.0)).sum(-1, dtype=torch.float64)
            found.append(divergence_C.cpu())
    return torch.cat(found)


def summary(texts: Sequence[Written], divergences_N: Tensor | None, metric: Metric | None = None) -> dict[str, Any]:
    """Return the figures of a model's texts, with 95 % intervals over texts where there are enough of them.

    `kl` is the mean over written tokens, `ended` the share of texts that the model ended, `repetition` the mean share
    of a text's 4-grams that it has had before (Welleck et al. 2020), `distinct_1` and `distinct_2` the share of
    different tokens and pairs among all (Li et al. 2016). Answers beside references: `exact_match`, `token_f1` (of
    words, as in Rajpurkar et al. 2016), `valid_json` (where the reference is JSON) and the user's `metric`.
    """
    ones_S = np.ones(len(texts))
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "ended": (np.array([float(text.ended) for text in texts]), ones_S),
        "repetition": (np.array([repetition(text.ids) for text in texts]), ones_S),
    }
    lengths_S = np.array([len(text.ids) for text in texts])
    if divergences_N is not None:
        by_text = np.split(divergences_N.numpy(), np.cumsum(lengths_S)[:-1])
        sums["kl"] = (np.array([each.sum() for each in by_text]), lengths_S)
    pairs = [(text.answer, text.reference) for text in texts if text.reference is not None]
    if pairs:
        sums |= {name: _over(pairs, score) for name, score in _SCORES.items()}
        if metric is not None:
            sums["metric"] = _over(pairs, metric)
        as_json = [pair for pair in pairs if is_json(pair[1])]
        if as_json:
            sums["valid_json"] = _over(as_json, lambda answer, _: float(is_json(answer)))
    found: dict[str, Any] = {name: float(value.sum() / count.sum()) for name, (value, count) in sums.items()}
    ends = {name: ratio_intervals(value[:, None], count) for name, (value, count) in sums.items()}
    finite = {name: pair[0] for name, pair in ends.items() if pair is not None and np.isfinite(pair).all()}
    found["intervals"] = {name: [float(low), float(high)] for name, (low, high) in finite.items()}
    found |= {"texts": len(texts), "tokens": int(lengths_S.sum()), "answers": len(pairs)}
    found |= {f"distinct_{size}": distinct([text.ids for text in texts], size) for size in (1, 2)}
    if divergences_N is not None:
        found["by_position"] = _by_position(divergences_N.numpy(), lengths_S)
    return found


def _over(pairs: Sequence[tuple[str, str]], score: Metric) -> tuple[np.ndarray, np.ndarray]:
    return np.array([float(score(answer, reference)) for answer, reference in pairs]), np.ones(len(pairs))


def _by_position(divergences_N: np.ndarray, lengths_S: np.ndarray) -> list[dict[str, Any]]:
    """Return the mean KL by the number of written tokens before a position; bins without positions are left out."""
    places_N = np.concatenate([np.arange(length) for length in lengths_S])
    found = []
    for low, high in zip(EDGES, [*EDGES[1:], None], strict=True):
        here_N = (places_N >= low) & (places_N < (high or np.inf))
        if here_N.any():
            one = {"from": low, "positions": int(here_N.sum()), "kl": float(divergences_N[here_N].mean())}
            found.append(one if high is None else one | {"to": high})
    return found


def repetition(ids: Sequence[int]) -> float:
    """Return the share of a text's 4-grams that occurred in it before: 0 to 1, 0 for a text without any."""
    grams = _ngrams(ids, _NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], size: int) -> float:
    """Return the share of different n-grams among those of all texts, 0 to 1."""
    grams = [gram for ids in texts for gram in _ngrams(ids, size)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)]


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the texts are the same but for white space at their ends, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, without case and punctuation."""
    ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
    common = (ours & theirs).total()
    if not common:
        return float(not ours and not theirs)
    return 2 * common / (ours.total() + theirs.total())


def is_json(text: str) -> bool:
    """Tell whether a text is a JSON object or array."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


_SCORES: dict[str, Metric] = {"exact_match": exact_match, "token_f1": token_f1}
