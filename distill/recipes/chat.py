"""`distill chat`: talk with a finished student in the terminal, or pipe prompts to it, a line each."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError, did_you_mean
from distill.experiment.folders import finished_model
from distill.generation import llama_server
from distill.generation.talk import ModelSpeaker, Speaker
from distill.models.chat_templates import TemplateError
from distill.models.devices import DTYPES, compute_dtype, pick_device
from distill.models.tokenizers import load_folder_tokenizer
from distill.plugins import load_language_model
from distill.system.progress import say, visible

COMMANDS = ("/quit", "/reset")
ANSWER_SHARE = 4
"""Share of the context that stays free for the answer: a quarter (or `max_new_tokens`, if that is less)."""
_SEEDS = range(-(2**63), 2**64)
"""Seeds that torch takes."""


def main(
    run: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int | None,
    system: str | None,
    class_path: str | None = None,
) -> int:
    """Answer each line of the standard input until it ends.

    Raises UserError for a run without a finished student, sampling options out of range, a system message that the
    model's chat template has no place for, and a model whose answers are not finite.
    """
    _check(temperature, top_p, max_new_tokens, seed, system)
    name, what, speaker = _open(run, class_path)
    chat = Chat(speaker, system)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p, "generator": generator}
    _introduce(name, what, chat)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is then skipped by itself
    with _interruptible() if sys.stdin.isatty() else contextlib.nullcontext():
        while _take_turn(chat, max_new_tokens, sampling):
            pass
    return 0


def _take_turn(chat: Chat, max_new_tokens: int, sampling: dict[str, Any]) -> bool:
    """Read a line and answer it. Returns False at the end."""
    try:
        line = _read_line()
        if line is None or line == "/quit":
            return False
        if not _is_text(line):
            say(f"(this line is not {sys.stdin.encoding or 'UTF-8'} text, and is not answered)")
        elif line.startswith("/"):
            _command(line.split()[0], chat)
        elif line:
            _print_answer(chat, line, max_new_tokens, sampling)
    except KeyboardInterrupt:
        say("\n(/quit or Ctrl-D leaves)")
    return True


def _check(temperature: float, top_p: float, max_new_tokens: int, seed: int | None, system: str | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: 0 takes the likeliest token, higher numbers are freer")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p}: a share of the probability, above 0 and up to 1")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: at least 1")
    if seed is not None and seed not in _SEEDS:
        raise UserError(f"--seed {seed}: from -2^63 up to 2^64 - 1")
    if system is not None and not _is_text(system):
        raise UserError("--system: not UTF-8 text")


def _is_text(words: str) -> bool:
    """Tell whether all of it was decoded: other bytes stand in a string as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in words)


def _open(run: str, class_path: str | None) -> tuple[Path, str, Speaker]:
    """Return the path of the student, some words about it, and the student as a speaker."""
    if (file := llama_server.gguf_file(Path(run))) is not None:
        if class_path is not None:
            raise UserError(f"--class_path: {file} is a GGUF file, which llama.cpp reads without a class")
        return file, f"by llama.cpp on {torch.get_num_threads()} cpu threads", llama_server.LlamaSpeaker(file)
    folder, device = finished_model(run), pick_device("auto")
    model = load_language_model(folder, device, DTYPES[compute_dtype("auto", device)], class_path)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    speaker = ModelSpeaker(model, load_folder_tokenizer(folder))
    return folder, f"{parameters:,.1f} M parameters on {device}", speaker


def _introduce(name: Path, what: str, chat: Chat) -> None:
    how = "answers" if chat.has_template else "continues each line (it has no chat template)"
    say(f"chat: {name}, {what}, {how}; /reset forgets, Ctrl-C stops an answer, /quit or Ctrl-D leaves")


def _command(command: str, chat: Chat) -> None:
    if command == "/reset":
        chat.reset()
        say("(forgotten)")
    else:
        say(f"({command}: no such command{did_you_mean(command, COMMANDS)})")


class Chat:
    """A conversation so far, and the speaker that continues it."""

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self._speaker = speaker
        self.has_template = speaker.has_template
        if system is not None and not self.has_template:
            raise UserError("--system: this student has no chat template, so there is no place for a system message")
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict[str, str]] = []
        """Messages after the system's, oldest first."""
        if system is not None:
            self._encode([{"role": "user", "content": "?"}])  # raises at once if the template refuses it

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns.clear()

    def answer(self, line: str, max_new_tokens: int, sampling: dict[str, Any]) -> Generator[str, None, None]:
        """Yield the answer to `line` in pieces of text that join to it. The conversation then has both.

        If the caller stops an answer early, the conversation keeps the text so far. A line without an answer is
        dropped. The oldest turns are forgotten when the context has no room for them, and a message says so.
        """
        self.turns.append({"role": "user", "content": line})
        shown: list[str] = []
        try:
            ids = self._fitting(max_new_tokens)
            if ids is None:
                return
            for piece in self._speaker.write(ids, max_new_tokens, sampling):
                shown.append(piece)
                yield piece
        finally:
            said = "".join(shown).strip()
            if said and self.has_template:
                self.turns.append({"role": "assistant", "content": said})
            else:
                self.turns.pop()

    def _fitting(self, max_new_tokens: int) -> list[int] | None:
        """Return the conversation's tokens, without its oldest turns if they do not fit; None if no turn fits."""
        limit, ids = self._speaker.context, self._encode(self.turns)
        if limit is None:
            return ids
        most = limit - min(max_new_tokens, limit // ANSWER_SHARE)
        alone = len(self._encode(self.turns[-1:]))
        if alone > most:
            say(f"(too long: {alone:,} tokens, and the context of {limit:,} has room for {most:,})")
            return None
        forgotten = 0
        while len(ids) > most:
            del self.turns[:2]  # a question and its answer
            forgotten += 1
            ids = self._encode(self.turns)
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            say(f"(the context of {limit:,} tokens is full: the oldest {turns} forgotten)")
        return ids

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        """Return the tokens that ask for the next answer. Without a template these are the last line's."""
        if not self.has_template:
            return self._speaker.encode_text(turns[-1]["content"])
        try:
            return self._speaker.encode([*self._system, *turns])
        except TemplateError as error:
            raise UserError(f"the student's chat template refuses the conversation: {error}") from error


def _print_answer(chat: Chat, line: str, max_new_tokens: int, sampling: dict[str, Any]) -> None:
    with contextlib.closing(chat.answer(line, max_new_tokens, sampling)) as pieces:  # a stopped answer is kept
        for piece in pieces:
            print(visible(piece), end="", flush=True)
    print(flush=True)


def _read_line() -> str | None:
    """Read the next line of the standard input, stripped, after a prompt in a terminal. None means the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and earlier lines for `input`
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside, which ends an answer, and restore its handler at the end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
