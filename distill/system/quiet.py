"""Silence of the libraries below: log lines, warnings, prints and progress bars, inside a `with` or for good."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(prints: bool = False) -> Iterator[None]:
    """Silence log lines up to errors and all warnings inside, and with `prints` both output streams.

    A failure still comes as an exception.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with contextlib.ExitStack() as streams, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if prints:
                streams.enter_context(contextlib.redirect_stdout(io.StringIO()))
                streams.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log lines and progress bars inside: the pipeline draws its own."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as theirs

    verbosity, bars, gguf_bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled(), gguf.tqdm
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    gguf.tqdm = theirs.tqdm  # that module draws its bar past the switch
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Switch off the progress bars of `datasets` inside, and leave the user's setting as it was."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def quiet_for_good(*loggers: str) -> None:
    """Let these loggers report errors alone from now on."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_command() -> None:
    """Silence the libraries for a whole command: their progress and warnings would bury ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a machine that waits for another warns at each try
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|torch|bitsandbytes|tqdm)\b.*")
    quiet_for_good(
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
        "transformers",
        "bitsandbytes",
        "datasets",
        "torchao",
        "mlflow",
        "lightning.pytorch.loggers",
        "torch.utils._pytree",  # about torchao
    )
