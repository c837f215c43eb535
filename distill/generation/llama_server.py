"""A GGUF file that speaks: llama.cpp's server on this machine's loopback, from the package xllamacpp."""

from __future__ import annotations

import ctypes
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError, first_line
from distill.generation.talk import Messages
from distill.models.chat_templates import TemplateError
from distill.models.safety import check_weights

LONGEST = 8192
"""Tokens of a conversation that are kept in memory at most, whatever the model could read."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Way to the loopback past any proxy that the environment names: what is said stays on this machine."""
INSTALL = "pip install 'distill-small-card[gguf]'"


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that `path` is or that alone lies in it, None if it is something else."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path}: holds {len(files)} GGUF files: name one, as {files[0]}")
    return files[0] if files else None


class LlamaSpeaker:
    """A GGUF file in llama.cpp's server, which ends with this process. It meets `distill.generation.talk.Speaker`."""

    def __init__(self, file: Path) -> None:
        """Open the file. Raises UserError without the packages of the extra gguf, and for a file that does not load."""
        try:
            import xllamacpp
            from gguf import GGUFReader
        except ImportError as error:
            raise UserError(f"{file}: a GGUF file needs llama.cpp: {INSTALL}") from error
        check_weights(file, str(file))
        parameters = xllamacpp.CommonParams()
        try:
            fields = GGUFReader(file).fields
            longest = fields[f"{fields['general.architecture'].contents()}.context_length"].contents()
            self.has_template = "tokenizer.chat_template" in fields
            self.context: int | None = min(int(longest), LONGEST)
            parameters.model.path = str(file.resolve())
            parameters.n_ctx = self.context
            parameters.n_parallel = 1
            parameters.n_gpu_layers = 0
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
            parameters.warmup = parameters.fit_params = False
            parameters.verbosity = -1
            self._server = xllamacpp.Server(parameters)
            # It is never taken down: the end of a server waits for its thread, now and then for ever.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._server))
        except Exception as error:  # the reader and the server raise errors of many kinds for what is no model
            raise UserError(f"{file}: llama.cpp does not open it ({first_line(error)})") from error

    def encode(self, messages: Messages) -> list[int]:
        try:
            prompt = self._ask("/apply-template", messages=messages)["prompt"]
        except UserError as error:
            raise TemplateError(str(error)) from error
        return self._tokens(prompt, frame=False)

    def encode_text(self, text: str) -> list[int]:
        return self._tokens(text, frame=True)

    def write(self, ids: list[int], max_new_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        seed = int(torch.randint(2**31, (), generator=sampling["generator"]))
        wanted = {"temperature": sampling["temperature"], "top_p": sampling["top_p"], "top_k": 0, "min_p": 0.0}
        wanted |= {"n_predict": max_new_tokens, "seed": seed, "stream": True}
        with self._open("/completion", prompt=ids, **wanted) as reply:  # closed early, the server stops
            for line in reply:
                if line.startswith(b"data: {"):
                    said = json.loads(line.removeprefix(b"data: "))
                    if "error" in said:
                        raise UserError(f"llama.cpp: {said['error'].get('message', 'an error')}")
                    if piece := said.get("content"):
                        yield piece

    def _tokens(self, text: str, frame: bool) -> list[int]:
        return list(self._ask("/tokenize", content=text, add_special=frame, parse_special=True)["tokens"])

    def _ask(self, path: str, **content: Any) -> dict[str, Any]:
        with self._open(path, **content) as reply:
            return dict(json.loads(reply.read()))

    def _open(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            return DIRECT.open(request)
        except urllib.error.HTTPError as error:
            try:
                said = str(json.loads(error.read())["error"]["message"])
            except (ValueError, LookupError, TypeError):
                said = str(error)
            raise UserError(f"llama.cpp: {said.splitlines()[0]}") from error
        except urllib.error.URLError as error:
            raise UserError(
                f"llama.cpp's server cannot be reached on this machine's loopback: {error.reason}"
            ) from error
