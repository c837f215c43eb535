"""Output that may break, such as a closed pipe, a full disk or a terminal that is gone, without ending the work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Unbreakable:
    """A text stream whose failed writes are lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let prints inside fail in silence: hours of work are worth more than their log."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        # A program that was started without a stream has None in its place.
        streams = [stream or nowhere for stream in before]
        sys.stdout, sys.stderr = map(_Unbreakable, streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in streams:
                try:
                    stream.flush()
                except OSError:  # Python's own flush at the end would fail again, with status 120
                    os.dup2(nowhere.fileno(), stream.fileno())
