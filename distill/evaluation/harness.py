"""A language model as lm-eval sees one: it answers requests through body and head, as lm-eval's own HF model does.

It needs lm-eval (extra `eval`). Shapes: B batch, L sequence length, N positions to score, C rows of a chunk, M tokens
to score (a position counts once for every continuation it scores), V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from distill.errors import UserError
from distill.models.generation import context_length, generate
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import LanguageModel
from distill.models.micro_batches import MicroBatches
from distill.system.progress import Progress

LOGITS_AT_A_TIME = 1 << 24
"""Logits in memory at once, 64 MiB in float32."""
ROWS_AT_LEAST = 32
"""Least rows of a product with the head. For fewer rows CPUs use another kernel, which rounds otherwise than HFLM's."""
MAX_NEW_TOKENS = 256
"""Largest number of new tokens for tasks that name none, as in lm-eval's HF model."""
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "num_return_sequences": 1}
"""Settings of generating tasks that mean nothing at these values. Settings with other values are refused."""

Request = tuple[Any, list[int], list[int]]
"""lm-eval's triple: strings or None, tokens of the context, tokens of the continuation."""


class HarnessModel(TemplateLM):
    """A model that scores and continues texts for lm-eval tasks.

    Scores follow lm-eval's `HFLM` (lm_eval/models/huggingface.py, 0.4.13): tokenisation, BOS, texts longer than the
    context (cut from the left), greedy matches. There are three differences. Only the first `vocab_size` rows of the
    head are normalised over; HFLM takes its padding rows for tokens. The log-softmax is in float32; HFLM's is in the
    model's own type. Logits are made at the continuations' positions only.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_length: int,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """Set up the model; `max_length` (tokens) is for models that do not say their own, see `longest_text`."""
        super().__init__()
        self.model, self.tokenizer, self.vocab_size, self.batch_size = model, tokenizer, vocab_size, batch_size
        self.max_length = longest_text(model, tokenizer, max_length)
        self.title: str | None = None
        """Title of the progress. None means that nothing is shown."""
        self.is_at_work = False
        """True while the model answers, and after it failed. Any error at another time is the task's fault."""
        self.cut = 0
        """Number of requests so far whose text was too long for the model, and was cut from the left."""
        self._device, self._passes = device, MicroBatches(model, batch_size)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, or EOS for tokenizers without one."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, with the tokenizer's automatic special tokens unless the text begins with BOS already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return for each continuation its log-probability (nats), and True if all its tokens are the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of whole texts in nats. Long ones go by windows, each token predicted once."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            of_text = [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Score the longest inputs first, so that running out of memory shows at once. Equal inputs are read once."""
        readers: dict[tuple[int, ...], list[int]] = {}
        for index, (strings, context, continuation) in enumerate(requests):
            readers.setdefault(self._input(strings, context, continuation), []).append(index)
        inputs = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, tuple[float, bool]] = {}
        with self._work(len(requests)) as advance:
            for start in range(0, len(inputs), self.batch_size):
                batch = inputs[start : start + self.batch_size]
                continuations = {index: requests[index][2] for tokens in batch for index in readers[tokens]}
                answers |= self._scores(batch, [readers[tokens] for tokens in batch], continuations)
                advance(len(continuations))
        return [answers[index] for index in range(len(requests))]

    def _input(self, strings: Any, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the model's input to predict a continuation: all but the last token, cut from the left if too long."""
        assert context, "lm-eval gives a text without context its prefix token"
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens; the model takes 1 to {self.max_length}: {strings!r}"
            )
        tokens = context + continuation
        self.cut += len(tokens) > self.max_length + 1
        return tuple(tokens[-(self.max_length + 1) :][:-1])

    def _scores(
        self, inputs: list[tuple[int, ...]], readers: list[list[int]], continuations: dict[int, list[int]]
    ) -> dict[int, tuple[float, bool]]:
        """Return the scores of continuations that end one token after `inputs`; `readers[i]` are the indices for input
        i.
        """
        hidden_BLD = self._read(inputs)
        hidden: list[Tensor] = []
        row_of_token: list[int] = []
        tokens: list[int] = []
        lengths: list[int] = []
        rows = 0
        for hidden_LD, input_, indices in zip(hidden_BLD, inputs, readers, strict=True):
            longest = max(len(continuations[index]) for index in indices)
            hidden.append(hidden_LD[len(input_) - longest : len(input_)])
            rows += longest
            for index in indices:
                row_of_token += range(rows - len(continuations[index]), rows)
                tokens += continuations[index]
                lengths.append(len(continuations[index]))
        logp_M, is_best_M = self._token_scores(torch.cat(hidden), row_of_token, tokens)
        scored = zip(logp_M.split(lengths), is_best_M.split(lengths), strict=True)
        order = [index for indices in readers for index in indices]
        return {index: (float(logp.sum()), bool(best.all())) for index, (logp, best) in zip(order, scored, strict=True)}

    def _read(self, inputs: list[tuple[int, ...]]) -> Tensor:
        """Return hidden states `[B, L, D]`, padded on the right, which no earlier position sees."""
        ids_BL = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int64)
        for row, tokens in enumerate(inputs):
            ids_BL[row, : len(tokens)] = torch.tensor(tokens)
        ids_BL = ids_BL.to(self._device)
        positions_BL = torch.arange(ids_BL.shape[1], device=self._device).expand_as(ids_BL)
        return self._passes.hidden_states(ids_BL, positions_BL)

    def _token_scores(self, hidden_ND: Tensor, rows: list[int], tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Return the log-probability `[M]` of `tokens[m]` at `hidden_ND[rows[m]]`, and if it is the likeliest; on the
        host.

        Equals the same entries of `log_softmax(head(hidden_ND))`, a chunk of rows at a time.
        """
        head = self.model.head.with_rows(self.vocab_size)
        row_M, token_M = torch.tensor(rows, device=self._device), torch.tensor(tokens, device=self._device)
        logp_M, is_best_M = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        chunk = max(ROWS_AT_LEAST, LOGITS_AT_A_TIME // self.vocab_size)
        for start in range(0, len(hidden_ND), chunk):
            hidden_CD = hidden_ND[start : start + chunk]
            missing = max(0, ROWS_AT_LEAST - len(hidden_CD))
            logits_CV = head(torch.nn.functional.pad(hidden_CD, (0, 0, 0, missing)))
            logp_CV = torch.log_softmax(logits_CV.float(), dim=-1)
            is_here_M = (row_M >= start) & (row_M < start + chunk)
            row_here, token_here = row_M[is_here_M] - start, token_M[is_here_M]
            is_here_M = is_here_M.cpu()
            logp_M[is_here_M] = logp_CV[row_here, token_here].cpu()
            is_best_M[is_here_M] = (logp_CV.argmax(dim=-1)[row_here] == token_here).cpu()
        return logp_M, is_best_M

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each context up to the first of its stop strings, without it."""
        texts = []
        with self._work(len(requests)) as advance:
            for request in requests:
                texts.append(self._continuation(*request.args))
                advance(1)
        return texts

    def _continuation(self, context: str, settings: dict[str, Any]) -> str:
        settings = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        stops = handle_stop_sequences(settings.pop("until"), eos=self._eos_text())
        max_new_tokens = settings.pop("max_gen_toks")
        ids = self._prompt(context, max_new_tokens)
        widths = [len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
        width = max(widths, default=0) + 2  # the model may write a stop string in other tokens than the encoder's
        tokens: list[int] = []
        for token in generate(
            self.model,
            ids,
            max_new_tokens,
            vocab_size=self.vocab_size,
            stop_ids=self._end_ids(),
            generator=self._generator,
            **sampling(settings),
        ):
            tokens.append(token)
            behind = self.tokenizer.decode(tokens[-width:])
            if any(stop and stop in behind for stop in stops):
                break
        return postprocess_generated_text(self.tokenizer.decode(tokens, skip_special_tokens=True), stops, None)

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        """Return the context's tokens, cut from the left to leave room for the new ones."""
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise UserError(f"the task generates {max_new_tokens} tokens; the model takes {self.max_length} in all")
        begins_with_bos = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self.tok_encode(context, add_special_tokens=False if begins_with_bos else None)
        self.cut += len(ids) > room
        return ids[-room:]

    def _eos_text(self) -> str | None:
        return None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)

    def _end_ids(self) -> frozenset[int]:
        """Return the tokens that end a generated text: the tokenizer's, and those of a Hugging Face model's config."""
        settings = self.model.model.generation_config if isinstance(self.model, HuggingFaceLanguageModel) else None
        said = getattr(settings, "eos_token_id", None)
        ends = said if isinstance(said, list) else [said]
        return frozenset(end for end in (*ends, self.eot_token_id) if end is not None)

    @contextlib.contextmanager
    def _work(self, requests: int) -> Iterator[Callable[[int], None]]:
        """Mark the time in which the model answers. The yielded function takes the number of requests answered."""
        self.is_at_work = True
        if self.title is None:
            yield lambda _: None
        else:
            with Progress(self.title, requests, "requests") as progress:
                yield progress.advance
        self.is_at_work = False  # stays True after a failure


def longest_text(model: LanguageModel, tokenizer: Any, otherwise: int) -> int:
    """Return the number of tokens in the longest text for the model.

    For a Hugging Face model it is the number that lm-eval's own HF model takes: its configuration's, else the
    tokenizer's, else 2,048. For any other model it is its attribute `max_position_embeddings`, or `otherwise`.
    """
    if isinstance(model, HuggingFaceLanguageModel):
        return resolve_max_length(model.model.config, tokenizer)
    return context_length(model) or otherwise


def sampling(settings: dict[str, Any]) -> dict[str, float]:
    """Return `temperature` and `top_p` of a task's normalised generation settings; greedy unless they ask for sampling.

    Raises UserError for settings that would change the text and are not known here.
    """
    unknown = {
        name: value
        for name, value in settings.items()
        if name not in ("do_sample", "temperature", "top_p") and value != NEUTRAL.get(name, ...)
    }
    if unknown:
        raise UserError(
            f"the task generates with {unknown}; known are do_sample, temperature, top_p, max_gen_toks, until"
        )
    if not settings.get("do_sample"):
        return {}
    if not settings.get("temperature", 0.0) > 0:
        raise UserError("the task samples (do_sample) and names no temperature above 0")
    return {"temperature": float(settings["temperature"]), "top_p": float(settings.get("top_p", 1.0))}
