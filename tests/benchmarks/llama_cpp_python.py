"""llama-cpp-python in a separate process, because it may crash: likelihoods of long texts under a GGUF file.

Run as `python tests/benchmarks/llama_cpp_python.py REQUEST ANSWER`, both JSON files. Nothing of ours is imported. A
native build crashes on virtual machines that show AMX: build it with
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip install llama-cpp-python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `{file, threads, texts, windows, prompts, new_tokens, logits}` by `{tokens, framed, nll, continuations}`.

    `windows` and `prompts` are lists of token ids. `tokens` are the ids of the texts, `framed` with the tokens that
    begin and end a text; `nll` is the sum over all windows' positions but the first, nats. With `logits` (a path) the
    first window's logits `[L, V]` go there as .npy.
    """
    import llama_cpp

    longest = max(
        *(len(window) for window in request["windows"]),
        *(len(prompt) + request["new_tokens"] for prompt in request["prompts"]),
    )
    model = llama_cpp.Llama(
        model_path=request["file"],
        n_ctx=longest,
        n_batch=longest,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=0,
        logits_all=True,
        verbose=False,
    )
    texts = [text.encode() for text in request["texts"]]
    found: dict[str, Any] = {
        "tokens": [model.tokenize(text, add_bos=False, special=True) for text in texts],
        "framed": [model.tokenize(text, add_bos=True, special=True) for text in texts],
        "nll": sum(_nll(model, window) for window in request["windows"]),
        "continuations": [_continuation(model, prompt, request["new_tokens"]) for prompt in request["prompts"]],
    }
    if request.get("logits"):
        _nll(model, request["windows"][0])
        np.save(request["logits"], model.scores[: len(request["windows"][0])])
    return found


def _nll(model: Any, ids: list[int]) -> float:
    model.reset()
    model.eval(ids)
    logits_LV = model.scores[: len(ids) - 1].astype(np.float64)
    largest_L1 = logits_LV.max(-1, keepdims=True)
    logsumexp_L = largest_L1[:, 0] + np.log(np.exp(logits_LV - largest_L1).sum(-1))
    return float((logsumexp_L - logits_LV[np.arange(len(ids) - 1), ids[1:]]).sum())


def _continuation(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    model.reset()
    found: list[int] = []
    ids = prompt
    while len(found) < new_tokens:
        model.eval(ids)
        ids = [int(model.scores[model.n_tokens - 1].argmax())]
        found += ids
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
