"""A check of a GGUF file against its student: by llama.cpp if it is installed, else by transformers.

Shapes: L tokens of a text, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distill
from distill.errors import UserError, first_line
from distill.export.gguf_families import MIXTURES, plan
from distill.export.gguf_tensors import query_divisor
from distill.models.checkpoints import Checkpoint, load_config
from distill.models.generation import context_length
from distill.models.huggingface import HuggingFaceLanguageModel, complain_about_missing
from distill.models.language_model import hidden_states
from distill.models.tokenizers import load_tokenizer, vocab_size
from distill.plugins import load_language_model
from distill.system.quiet import quiet_transformers

TOLERANCES = {"f16": 0.01, "q8_0": 0.02, "q4_0": 0.10}
"""Allowed difference of the perplexity, as a share of the student's own."""
TIE = 2.0**-9
"""Gap of two logits that float16's arithmetic cannot tell apart, as a share of the position's largest: float16's unit
is 2⁻¹¹, and errors are some units.
"""
SWITCHED = 0.05
"""Share of a mixture's greedy tokens that may differ at f16: rounding decides between experts that nearly tie."""
NEW_TOKENS = 32
UNREACHABLE = 3
"""Exit status of `PROGRAM` on a machine without a loopback, such as some containers."""
PROGRAM = ("-m", "distill.export.gguf_llama_cpp")
WINDOW = 512
PLACES = 256
"""Positions at which whole distributions are compared."""
FARTHEST = {"f16": 0.01, "q8_0": 0.03, "q4_0": 0.5}
"""Allowed mean KL(student ‖ file) there, in nats a token."""
INSTALL = "pip install 'distill-small-card[gguf]' installs it ready made (xllamacpp)"
PROMPTS = (
    "The most important thing to know about water is that",
    "Once upon a time there was a small village where",
    "In the year 1850 the government decided to",
    "def add(first, second):\n    ",
    "My fellow citizens, I am here today to",
)
TEXTS = (
    "The cat sat on the mat; it didn't move, and they'll say it's asleep. WE'VE SEEN IT.",
    "In 2024, 1234567890 people paid $3.14 (or 12,345.67 in 1999); x²+½ ≠ 42٣٤.",
    "two  blanks\t\ttabs\n\n\nnew lines \r\n and   an end  ",
    "naïve café, Straße, Ελληνικά, Привет мир, 日本語のテキスト, 한국어, עברית, हिन्दी, ไทย",
    "emoji 😀👩\u200d👩\u200d👧 zero\u200bwidth, “quotes” – dashes — … ™ ﬁ",
    "def f(x):\n    return {'a': [x, 1], \"b\": x**2}  # note\n\n\tif x != None: pass",
    "camelCase HTTPServer snake_case http://a.b/c?d=e&f=1 #tag @name 100% a+b=c <b>bold</b> \\n",
    "a",
)
"""Texts that tokenizers differ in: contractions, digits, blanks, scripts, marks, code. All are in Unicode's NFC."""
PASSAGE = (
    "A river begins as a small stream in the hills, where rain and melting snow run down over the stones. On its way "
    "to the sea it grows, because other streams join it, and the valley through which it flows becomes wider. People "
    "have always lived beside rivers. They drank the water, caught fish, and used the current to carry goods from one "
    "town to the next. In spring, when the snow melts, a river can rise by several metres within a few days, and the "
    "fields along its banks are covered with mud. For a farmer this was both a danger and a gift: the flood destroyed "
    "houses and bridges, but it left behind a rich soil in which wheat grew well. Later, engineers built walls of "
    "earth to keep the water in its bed, and mills whose wheels turned day and night. Today many of the old mills are "
    "museums. The water still flows past them, as it did before there was anybody to give the river a name, and "
    "children throw sticks from the bridge and run to the other side to see which of them comes out first."
)


@dataclass(frozen=True)
class Comparison:
    """Results of llama.cpp (or transformers) with the file, against ours with the student."""

    ours: float
    """Negative log-likelihood a token, nats."""
    theirs: float
    positions: int
    texts: int
    other_texts: list[str]
    """Texts that llama.cpp and the tokenizer cut into different tokens."""
    continued: int
    """Tokens of greedy continuations."""
    best: int
    """Tokens among these that are our best token too, given llama.cpp's tokens before. All: equal continuations.
    """
    ties: int
    """Tokens among the others whose logit lies within `TIE` of our best token's."""
    kl: float | None = None
    """Mean KL(student ‖ file) over the positions, nats; None where only the true next tokens were compared."""

    @property
    def drift(self) -> float:
        """Ratio of their perplexity to ours, minus one."""
        return math.expm1(self.theirs - self.ours)


def check(checkpoint: Checkpoint, file: Path, type: str, text: str | None = None) -> str:
    """Return one line that says what was compared. Raises UserError if the file is not good enough."""
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(PASSAGE if text is None else text)
    why = "it is not installed"
    if importlib.util.find_spec("xllamacpp") is not None:
        try:
            is_mixture = load_config(checkpoint).model_type in MIXTURES
            return _verdict(compare(checkpoint, file, ids), file, type, SWITCHED if is_mixture else 0.0)
        except ProcessDied as death:
            why = str(death)
    found = compare_by_transformers(checkpoint, file, ids)
    _hold(found, file, type)
    return (
        f"{file.name}: read back by transformers, perplexity {_perplexities(found)}; llama.cpp itself did not try it: "
        f"{why}; {INSTALL}"
    )


def _verdict(found: Comparison, file: Path, type: str, switched: float = 0.0) -> str:
    """Return what was found, or raise as `check` does; `switched` is the share of greedy tokens that may differ."""
    _hold(found, file, type)
    if found.other_texts:
        raise UserError(
            f"{file.name}: llama.cpp cuts {len(found.other_texts)} of {found.texts} texts into other tokens than "
            f"the tokenizer does, the first is {found.other_texts[0]!r}"
        )
    if type == "f16" and found.best + found.ties < (1 - switched) * found.continued:
        raise UserError(
            f"{file.name}: llama.cpp continues prompts otherwise: {found.continued - found.best - found.ties} of "
            f"{found.continued} tokens are not the student's best"
        )
    ties = f", {found.ties} tied" if found.ties else ""
    kl = "" if found.kl is None else f", KL to the student {found.kl:.4f} nats"
    return (
        f"{file.name}: llama.cpp makes the same tokens of {found.texts} texts, perplexity {_perplexities(found)}{kl}, "
        f"greedy {found.best} of {found.continued} tokens the same{ties}"
    )


def _perplexities(found: Comparison) -> str:
    ours, theirs = math.exp(found.ours), math.exp(found.theirs)
    return f"{theirs:.4g} (ours {ours:.4g}, {found.drift:+.2%}, {found.positions} tokens)"


def _hold(found: Comparison, file: Path, type: str) -> None:
    advice = {"q8_0": ": use --type f16", "q4_0": ": use --type q8_0"}.get(type, "")
    if found.kl is not None and not found.kl <= FARTHEST[type]:
        raise UserError(
            f"{file.name}: llama.cpp answers otherwise than the student: KL {found.kl:.3f} nats a token, more than "
            f"{FARTHEST[type]}{advice}"
        )
    if not abs(found.drift) <= TOLERANCES[type]:
        raise UserError(
            f"{file.name}: perplexity {_perplexities(found)}, off by more than {TOLERANCES[type]:.0%}{advice}"
        )


def compare(checkpoint: Checkpoint, file: Path, ids: list[int], texts: tuple[str, ...] = TEXTS) -> Comparison:
    """Compare the file in llama.cpp with the student, on `PLACES` places of the first window of `ids`.

    Raises `ProcessDied` if llama.cpp crashes, UserError if it does not load the file.
    """
    tokenizer, model = load_tokenizer(checkpoint), load_language_model(checkpoint.folder)
    vocabulary = vocab_size(tokenizer)
    context = min(context_length(model) or WINDOW, plan(load_config(checkpoint)).context)
    window = _windows(ids, min(WINDOW, context))[0]
    places = torch.linspace(0, len(window) - 2, min(PLACES, len(window) - 1)).round().long().unique()
    new_tokens = max(1, min(NEW_TOKENS, context // 2))
    prompts = [tokenizer.encode(prompt)[: context - new_tokens] for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        request: dict[str, Any] = {"file": str(file.resolve()), "threads": torch.get_num_threads(), "texts": texts}
        request |= {"prompts": prompts, "new_tokens": new_tokens, "ids": window, "places": places.tolist()}
        logp = Path(folder) / "logp.npy"
        theirs = _ask({**request, "vocabulary": vocabulary, "logp": str(logp)})
        theirs_PV = torch.from_numpy(np.load(logp)).double()
    other = [
        text
        for text, tokens, framed in zip(texts, theirs["tokens"], theirs["framed"], strict=True)
        if tokens != tokenizer.encode(text, add_special_tokens=False) or framed != tokenizer.encode(text)
    ]
    best, ties = 0, 0
    for prompt, tokens in zip(prompts, theirs["continuations"], strict=True):
        logits_LV = _logits(model, prompt + tokens[:-1], vocabulary)[len(prompt) - 1 :]
        chosen_L = logits_LV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gap_L = logits_LV.amax(-1) - chosen_L
        best += int((gap_L == 0).sum())
        ties += int(((gap_L > 0) & (gap_L <= TIE * logits_LV.abs().amax(-1))).sum())
    ours_PV = torch.log_softmax(_logits(model, window, vocabulary)[places].double(), -1)
    kl = float((ours_PV.exp() * (ours_PV - theirs_PV)).sum(-1).mean())
    next_P1 = torch.tensor(window)[places + 1][:, None]
    ours, seen = (-float(each.gather(1, next_P1).mean()) for each in (ours_PV, theirs_PV))
    return Comparison(ours, seen, len(places), len(texts), other, new_tokens * len(prompts), best, ties, kl)


def compare_by_transformers(checkpoint: Checkpoint, file: Path, ids: list[int]) -> Comparison:
    """Compare the file's weights, as transformers reads them into the student's own configuration, with the student."""
    vocabulary = vocab_size(load_tokenizer(checkpoint))
    model = load_language_model(checkpoint.folder)
    windows = _windows(ids, min(WINDOW, context_length(model) or WINDOW))
    ours, positions = _nll(model, windows, vocabulary)
    del model
    config = load_config(checkpoint)
    config.vocab_size = vocabulary
    if (divisor := query_divisor(config)) is not None:  # the file's queries are scaled for this divisor
        config.query_pre_attn_scalar = divisor
    theirs, _ = _nll(HuggingFaceLanguageModel(_read_by_transformers(file, config)).eval(), windows, vocabulary)
    return Comparison(ours, theirs, positions, 0, [], 0, 0, 0)


def _read_by_transformers(file: Path, config: Any) -> Any:
    import transformers

    if config.model_type == "mistral":  # the reader does not know Mistral, which is Llama under another name
        config = transformers.LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    with quiet_transformers():
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                config=config,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report tells of them
                trust_remote_code=False,
            )
        except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
            reason = f"transformers does not read it ({first_line(error)})"
            raise UserError(f"{file.name}: {reason}, so that only llama.cpp can check it: {INSTALL}") from error
    model, report = loaded
    complain_about_missing(report, file.name)
    return model


def _windows(ids: list[int], length: int) -> list[list[int]]:
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UserError("gguf: the text to compare on has fewer than two tokens")
    return windows


def _nll(model: Any, windows: list[list[int]], vocabulary: int) -> tuple[float, int]:
    """Return the mean over all positions that have a next token, in nats, and their number."""
    total, positions = 0.0, 0
    for window in windows:
        logp_LV = torch.log_softmax(_logits(model, window, vocabulary)[:-1], -1)
        total -= float(logp_LV.gather(1, torch.tensor(window[1:])[:, None]).double().sum())
        positions += len(window) - 1
    return total / positions, positions


@torch.no_grad()
def _logits(model: Any, ids: list[int], vocabulary: int) -> Tensor:
    """Return float32 logits `[L, V]`."""
    ids_BL = torch.tensor([ids])
    hidden_LD = hidden_states(model, ids_BL, torch.arange(len(ids))[None])[0]
    return model.head.with_rows(vocabulary)(hidden_LD).float()


class ProcessDied(Exception):
    """Raised when llama.cpp gave no answer, whatever the file. The message says why."""


def _ask(request: dict[str, Any], program: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return llama.cpp's answer, from a separate process; `program` is another one than `PROGRAM`."""
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        ours = str(Path(distill.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ours, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, *(program or PROGRAM), str(asked), str(answered)]
        # `-m` looks for modules in the current folder first, and that may be a stranger's.
        done = subprocess.run(command, cwd=name, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode < 0:
            raise ProcessDied(f"it crashed here ({signal.Signals(-done.returncode).name})")
        if done.returncode == UNREACHABLE:
            raise ProcessDied("its server cannot be reached on this machine's loopback")
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it gives no reason"]
            raise UserError(f"{request['file']}: llama.cpp does not run it: {said[-1]}")
        return dict(json.loads(answered.read_text(encoding="utf-8")))
