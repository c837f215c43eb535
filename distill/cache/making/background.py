"""A writer beside the teacher: a thread codes, hashes and writes batches while the next ones are computed."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from distill.cache.format.records import Record
from distill.cache.making.writer import CacheWriter

QUEUE_BATCHES = 2
"""Largest number of finished batches that wait to be written. They are what a kill costs beside the one in work."""
_POLL_SECONDS = 0.1


class BackgroundWriter:
    """A thread that writes batches. Use it as a context manager; its end waits until all of them are on disk.

    An error in the thread is raised by the next call here, or by the end of the context. If the context ends with
    another error (an interruption, say), the batches handed over before are still written.
    """

    def __init__(self, writer: CacheWriter) -> None:
        self.writer, self.manifest = writer, writer.manifest
        self.bytes = self.positions = 0
        """Written so far, in whole shards."""
        self._queue: queue.Queue[tuple[int, list[Record], int] | None] = queue.Queue(QUEUE_BATCHES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cache writer", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def add(self, shard: int, batch: list[Record], batch_size: int) -> None:
        """Hand over a shard's next batch, and wait while the queue is full."""
        self._put((shard, batch, batch_size))

    def check(self) -> None:
        """Raise the thread's error, if there is one."""
        if self._error:
            raise self._error

    def _put(self, item: tuple[int, list[Record], int] | None) -> None:
        while True:
            self.check()
            try:
                return self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue  # the thread may have died meanwhile

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                entry = self.writer.add(*item)
                if entry is None:
                    continue
                self.bytes, self.positions = self.bytes + entry.bytes, self.positions + entry.positions
        except BaseException as error:
            self._error = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._error is None:
            self._finish()
        if error is not self._error:
            self.check()

    def _finish(self) -> None:
        try:
            self._put(None)
        except BaseException:
            if self._error is None:  # a second Ctrl-C while waiting
                raise
            return
        self._thread.join()
