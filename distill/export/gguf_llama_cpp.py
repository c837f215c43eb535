"""llama.cpp in a separate process, because it may crash: token ids, distributions and continuations of a GGUF file.

Run as `python -m distill.export.gguf_llama_cpp REQUEST ANSWER`, both JSON files. Nothing of ours is imported. The
package xllamacpp brings llama.cpp ready made; its server listens on this machine's loopback alone.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

_SERVERS: list[Any] = []
"""Servers that stay until the process ends: the end of one waits for its thread, now and then for ever."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `{file, threads, texts, prompts, new_tokens, ids, places, vocabulary, logp}` by `{tokens, framed,
    continuations}`.

    `tokens` are the ids of the texts, `framed` with the tokens that begin and end a text. Each prompt, a list of ids,
    is continued by its `new_tokens` best tokens.
    The log-probabilities `[P, V]` of the token after each of the `places` in `ids` go to the file `logp` as .npy.
    """
    import xllamacpp

    longest = max(len(request["ids"]), *(len(prompt) + request["new_tokens"] for prompt in request["prompts"]), 1)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["file"]
    parameters.n_ctx = longest + 8
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    _SERVERS.append(server)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past any proxy of the environment

    def ask(path: str, **content: Any) -> dict[str, Any]:
        data = json.dumps(content).encode()
        asked = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with direct.open(asked) as reply:
            return dict(json.loads(reply.read()))

    def tokens(text: str, frame: bool) -> list[int]:
        return list(ask("/tokenize", content=text, add_special=frame, parse_special=True)["tokens"])

    # The server keeps a token's distribution back while its bytes are no whole character, and when it ends the text. So
    # the token that it takes is always this one; the distribution is that of before.
    plain = tokens("a", False)[-1]

    def following(ids: list[int], number: int) -> list[dict[str, Any]]:
        """Return the `number` likeliest tokens after `ids`, each with its log-probability."""
        forced = {"n_predict": 1, "temperature": 0, "logit_bias": [[plain, 1e4]], "ignore_eos": True}
        said = ask("/completion", prompt=ids, n_probs=number, **forced)
        return list(said["completion_probabilities"][0]["top_logprobs"])

    found: dict[str, Any] = {
        "tokens": [tokens(text, False) for text in request["texts"]],
        "framed": [tokens(text, True) for text in request["texts"]],
        "continuations": [],
    }
    for prompt in request["prompts"]:
        ids = list(prompt)
        for _ in range(request["new_tokens"]):
            ids.append(following(ids, 1)[0]["id"])
        found["continuations"].append(ids[len(prompt) :])
    logp_PV = np.full((len(request["places"]), request["vocabulary"]), np.nan, dtype=np.float32)
    for row_V, place in zip(logp_PV, request["places"], strict=True):
        for entry in following(request["ids"][: place + 1], request["vocabulary"]):
            row_V[entry["id"]] = entry["logprob"]
    np.save(request["logp"], logp_PV)
    return found


def main() -> int:
    """Answer the request of the command line, and return the exit status."""
    try:
        Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
    except urllib.error.URLError as error:
        if not isinstance(error, urllib.error.HTTPError):
            return 3  # `gguf_check.UNREACHABLE`
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without the end of `_SERVERS`
