"""Errors of fsspec's file systems, in one line each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from distill.errors import UserError, first_line
from distill.system import failures


@contextlib.contextmanager
def explained(what: str, missing: str = "is missing", verb: str = "read") -> Iterator[None]:
    """Turn the errors of a file system into UserErrors of one line about `what`, which was to be read or written.

    `missing` is said of a file that is not there.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if verb == "read":
            raise UserError(f"{what}: {missing}") from None
        raise UserError(f"{what}: cannot be written ({first_line(error)})") from None
    except ImportError as error:
        raise UserError(f"{what}: {first_line(error)}") from None
    except Exception as error:  # every file system has exceptions of its own
        if (line := failures.explain(error)) is not None:  # a disk of this machine
            raise UserError(line) from None
        raise UserError(f"{what}: cannot be {verb} ({type(error).__name__}: {first_line(error)})") from None
