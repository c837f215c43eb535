"""A server as author: any with OpenAI's completions (llama.cpp, vLLM, Ollama), asked for several texts at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from distill.errors import UserError, did_you_mean, first_line
from distill.generation.authors import Answer, Asked, Report
from distill.generation.sampling import Sampling, uniforms
from distill.system import interrupt
from distill.system.progress import say

TRIES = 8
"""Requests for one text. The waits between them double from one second: two minutes in all."""
TIMEOUT = 600.0
"""Seconds without a byte after which a request counts as lost."""
_LONGEST_WAIT = 60.0
_MOST_BYTES = 64 << 20
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that is busy, starting or ill, and may answer the same request later."""
_REFUSES_IDS = (400, 415, 422, 501)
"""Statuses of a server that takes no token ids as a prompt."""


class _Lost(Exception):
    """Reason why a request gave no whole answer, though the next may."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the server asks to wait; None if it does not say."""


class _Refused(Exception):
    """The server's answer to a request that it will never take."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class ServerAuthor:
    """A model behind HTTP. Its texts become tokens by the local tokenizer, compared with the server's counts."""

    is_cached = True

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        tokenizer: Any,
        end_ids: tuple[int | None, int | None],
        sampling: Sampling,
        max_new_tokens: int,
        batch_size: int,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Ask the server for its models.

        `end_ids` are the tokens that stand for the end of an answer and of a plain text that it ended. `batch_size`
        texts are asked for at one time. Raises UserError for a server that is not there, or lacks `model`.
        """
        self._url, self._tokenizer, self._end_ids = url.rstrip("/"), tokenizer, end_ids
        self._sampling, self._most, self.batch_size, self._wait = sampling, max_new_tokens, batch_size, wait
        self._takes_ids = True
        self._is_over = threading.Event()
        self.other_counts = 0
        """Texts that the local tokenizer reads as another number of tokens than the server wrote."""
        self.model = self._chosen(model)

    def _chosen(self, model: str | None) -> str:
        try:
            found = self._exchange("models", None)
            names = [str(entry["id"]) for entry in found["data"]]
        except (_Lost, _Refused) as error:
            raise UserError(
                f"generate.server: {self._url}: does not answer ({error}): start the server, or mend the address, such "
                "as http://127.0.0.1:8080/v1"
            ) from None
        except (KeyError, TypeError):
            raise UserError(
                f"generate.server: {self._url}/models gives no list of models: is it an OpenAI API?"
            ) from None
        if model is None and len(names) != 1:
            raise UserError(f"generate.server: {self._url} has {len(names)} models: name one as generate.server_model")
        if model is not None and model not in names:
            raise UserError(f"generate.server_model: {self._url} has no model '{model}'{did_you_mean(model, names)}")
        return names[0] if model is None else model

    def write(self, asked: Sequence[Asked], report: Report) -> list[Answer]:
        """Ask for all texts, `batch_size` at one time. Raises UserError if a text cannot be had."""
        waiting: queue.SimpleQueue[tuple[int, Asked]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        for pair in enumerate(asked):
            waiting.put(pair)
        self._is_over.clear()

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not self._is_over.is_set():
                    place, each = waiting.get_nowait()
                    try:
                        done.put((place, self._text(each)))
                    except BaseException as error:  # raised in the thread that asked
                        done.put((place, error))

        # Daemons: an interrupted program does not wait for answers that nobody wants any more.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.batch_size, len(asked)))]
        for thread in threads:
            thread.start()
        answers: dict[int, Answer] = {}
        try:
            while len(answers) < len(asked):
                interrupt.stop_if_asked()
                try:
                    place, found = done.get(timeout=0.5)
                except queue.Empty:
                    continue
                if isinstance(found, BaseException):
                    raise found
                answers[place] = found
                report(found)
        finally:
            self._is_over.set()
        return [answers[place] for place in range(len(asked))]

    def _text(self, asked: Asked) -> Answer:
        content = self._content(asked)
        for attempt in range(TRIES):
            prompt = self._prompt(asked)
            try:
                return self._answer(asked, self._exchange("completions", {**content, "prompt": prompt}))
            except _Refused as error:
                if isinstance(prompt, list) and error.status in _REFUSES_IDS:
                    self._takes_ids = False
                    return self._text(asked)
                raise UserError(f"generate.server: {self._url}: refuses a request ({error})") from None
            except _Lost as error:
                if self._is_over.is_set() or attempt == TRIES - 1:
                    raise UserError(
                        f"generate.server: {self._url}: no whole answer in {TRIES} tries ({error}); finished parts are "
                        "kept: look at the server, then run the same command again"
                    ) from None
                wait = min(2.0**attempt if error.wait is None else error.wait, _LONGEST_WAIT)
                say(f"generate: the server gave no whole answer ({error}); asking again in {wait:g} s")
                self._wait(wait)
        raise AssertionError("the last try returns or raises")

    def _content(self, asked: Asked) -> dict[str, Any]:
        """Return the request but for the prompt. Its seed is a function of ours, the prompt and the sample."""
        sampling = self._sampling
        seed = int(uniforms(sampling.seed, [asked.prompt], [asked.sample], 0)[0] * 2**31)
        content = {
            "model": self.model,
            "max_tokens": self._most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
        # OpenAI's own API does not know these.
        more = {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
        return content | {name: value for name, value in more.items() if value is not None}

    def _prompt(self, asked: Asked) -> list[int] | str:
        if self._takes_ids:
            return asked.ids
        return str(self._tokenizer.decode(asked.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _answer(self, asked: Asked, found: Any) -> Answer:
        """Return the answer in tokens.

        Raises _Lost for half an answer, UserError for another API's and if the prompt was read otherwise.
        """
        if isinstance(found, dict) and not found.keys() & {"choices", "error"}:
            raise UserError(
                f"generate.server: {self._url}: answers in another form than OpenAI's completions: is /v1 missing at "
                "the end of the address?"
            )
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text, reason = str(choice["text"]), choice["finish_reason"]
            if reason not in ("stop", "length"):
                raise _Lost(f"finish_reason {reason!r}")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Lost("an answer without choices, text or finish_reason") from None
        read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if type(read) is int and read != len(asked.ids):
            raise UserError(
                f"generate.server: {self._url}: reads {read:,} tokens of a prompt of {len(asked.ids):,}: it has "
                "another tokenizer than the teacher, or puts a token of its own in front: serve the teacher's own model"
            )
        # What looks like a special token in a text was written letter by letter.
        ids = list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if type(written) is int and written not in (len(ids), len(ids) + (reason == "stop")):
            self.other_counts += 1
        if len(ids) > self._most:
            ids, reason = ids[: self._most], "length"
        end_id = next((end for end in self._end_ids[0 if asked.is_answer else 1 :] if end is not None), None)
        ended = reason == "stop" and end_id is not None
        if not ids and not ended:
            raise _Lost("an empty text that was cut")
        return Answer([*ids, end_id] if ended and end_id is not None else ids, ended)

    def _exchange(self, path: str, content: dict[str, Any] | None) -> Any:
        """Return the JSON that the server answers. Raises _Lost or _Refused."""
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            request = urllib.request.Request(f"{self._url}/{path}", data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                body = answer.read(_MOST_BYTES + 1)
            if len(body) > _MOST_BYTES:
                raise _Refused(answer.status, "an answer longer than any text")
            return json.loads(body)
        except urllib.error.HTTPError as error:
            reason = _reason(error)
            if error.code in _PASSING:
                raise _Lost(f"status {error.code}: {reason}", _seconds(error.headers.get("Retry-After"))) from None
            raise _Refused(error.code, reason) from None
        except urllib.error.URLError as error:
            raise _Lost(str(error.reason) or "no answer") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Lost(first_line(error) or type(error).__name__) from None
        except ValueError as error:  # half an answer, or an address that is none
            raise _Lost(f"no JSON: {first_line(error)}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the server's own words, short."""
    try:
        body = error.read(1 << 16)
        found = json.loads(body)
        found = found.get("error", found)
        text = found.get("message", found) if isinstance(found, dict) else found
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        text = error.reason
    return str(text)[:200]


def _seconds(text: str | None) -> float | None:
    """Return the seconds of a Retry-After; None for a date, or nothing."""
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
