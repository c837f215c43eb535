"""Loggers of a training's curves: files in the run folder, and services."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from distill.errors import UserError
from distill.system.files import make_folder, names_only
from distill.system.rank import is_first_process

PROJECT = "distill"
"""Name under which the services file the trainings, unless their own environment variables say otherwise."""

COLUMNS = (
    *("step", "epoch", "loss", "auxiliary_loss", "learning_rate", "gradient_norm"),
    *("held_out_kl", "held_out_loss", "held_out_nll", "teacher_nll"),
)
"""Columns of metrics.csv."""


def make_loggers(names: Iterable[str], folder: Path, run_name: str, settings: dict[str, Any]) -> list[Logger]:
    """Start the loggers and note the settings. In the processes that do not write there are none.

    Each start of a training is a log of its own: an earlier `metrics.csv` gets a number, a service gets another run of
    the same name. The services' own variables set the rest, such as `WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`
    (default: a database in `folder`) and `TRACKIO_DIR`.

    Args:
        names: of tensorboard, csv, wandb, mlflow, trackio.
        folder: folder of the files.
        run_name: the services' name for this training.
        settings: settings of the experiment, nested; noted as hyperparameters, paths by their last parts.

    Raises UserError if one is not installed or cannot begin.
    """
    if not is_first_process():
        return []
    names = sorted(dict.fromkeys(names), key=lambda name: name != "csv")  # csv first, or it warns of others' files
    check_installed(names)
    make_folder(folder)
    return [_begun(name, folder, run_name, names_only(settings)) for name in names]


def check_installed(names: Iterable[str]) -> None:
    """Raise UserError for the first of the services that cannot be imported."""
    for name in names:
        if name in _SERVICES:
            with _blamed(name):
                importlib.import_module(name)


def check_loggers(names: Iterable[str]) -> None:
    """Raise UserError for the first of the services whose logger cannot be made, or that lacks an account.

    None begins a run, and none is asked over the network.
    """
    check_installed(names)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name in _SERVICES:
                with _blamed(name):
                    _SERVICES[name](Path(folder), "check")
                    if name == "wandb":
                        _find_account()


def _find_account() -> None:
    """Raise wandb's error if it would find no key of an account later; in a terminal, wandb asks for one."""
    wandb = importlib.import_module("wandb")
    if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
        wandb.login(verify=False)


@contextlib.contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Turn a service's errors into UserErrors."""
    try:
        yield
    except ImportError as error:  # a module of it is missing, or Lightning finds it too old
        why = " ".join(str(error).split())
        raise UserError(
            f"train.loggers: {name} is not installed ({why}): pip install {name}, or leave it out"
        ) from None
    except Exception as error:  # no account, no server, no network: each service has error classes of its own
        lines = [*str(error).strip().splitlines(), type(error).__name__]
        raise UserError(
            f"train.loggers: {name} cannot begin: {lines[0].rstrip('.')}: mend that, or leave {name} out"
        ) from error


def _begun(name: str, folder: Path, run_name: str, settings: dict[str, Any]) -> Logger:
    if name not in _SERVICES:
        logger = _FILES[name](folder)
        logger.log_hyperparams(settings)
        return logger
    with _blamed(name):
        service = _SERVICES[name](folder, run_name)
        service.log_hyperparams(settings)
    return service


def _csv(folder: Path) -> Logger:
    """Make the CSV logger. Lightning deletes an existing log, so an earlier start's log is renamed with a number."""
    log = folder / "metrics.csv"
    if log.exists():
        taken = [int(old.suffixes[0][1:]) for old in folder.glob("metrics.*.csv") if old.suffixes[0][1:].isdigit()]
        log.rename(folder / f"metrics.{max(taken, default=0) + 1}.csv")
    logger = CSVLogger(folder, name=None, version="")
    # For a new column Lightning writes the file anew, and a kill would leave half of it. So all of ours are there.
    logger.experiment.metrics_keys = sorted(COLUMNS)
    return logger


def _tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name=None, version="")


def _mlflow(folder: Path, run_name: str) -> Logger:
    """Make the MLflow logger with a database, since MLflow has given up plain folders.

    Its own database needs the whole package, mlflow-skinny only a server.
    """
    place: dict[str, Any] = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")}
    if not place["tracking_uri"]:
        database = (folder / "mlflow.db").absolute()
        place = {
            "tracking_uri": f"sqlite:///{database.as_posix()}",
            "artifact_location": (folder / "mlflow").absolute().as_uri(),
        }
    return MLFlowLogger(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), run_name, **place)


def _wandb(folder: Path, run_name: str) -> Logger:
    return _Wandb(run_name, folder, project=os.environ.get("WANDB_PROJECT", PROJECT))


class _Wandb(WandbLogger):
    """Lightning's logger, but it closes the run. Otherwise the next training in this process would continue it."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def _trackio(folder: Path, run_name: str) -> Logger:
    return TrackioLogger(PROJECT, run_name)


def log_texts(logger: Logger, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Give texts that a model wrote after prompts to a logger that shows texts; the CSV logger does not."""
    pairs = [[prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
    if isinstance(logger, TensorBoardLogger):
        for number, (prompt, text) in enumerate(pairs, 1):
            shown = f"{prompt} ▸ {text}".replace("\n", "\n    ")  # indented, which is Markdown for text as it is
            logger.experiment.add_text(f"text {number}", f"    {shown}", step)
    elif isinstance(logger, WandbLogger):
        logger.log_text("texts", columns=["prompt", "text"], data=pairs, step=step)
    elif isinstance(logger, MLFlowLogger):
        content = "\n\n".join(f"{prompt} ▸ {text}" for prompt, text in pairs)
        logger.experiment.log_text(logger.run_id, content, f"texts/step-{step:08}.txt")
    elif isinstance(logger, TrackioLogger):
        logger.log_texts(pairs, step)


class TrackioLogger(Logger):
    """Trackio (https://github.com/gradio-app/trackio), for which Lightning has no logger."""

    def __init__(self, project: str, run_name: str) -> None:
        super().__init__()
        self._trackio: Any = importlib.import_module("trackio")
        self._project, self._run_name = project, run_name
        self._settings: dict[str, Any] = {}
        self._is_open = False

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._run_name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Begin the run, because Trackio takes the hyperparameters at the beginning only."""
        assert not self._is_open
        self._settings |= vars(params) if isinstance(params, Namespace) else params
        self._begin()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self._is_open:
            self._begin()
        self._trackio.log(dict(metrics), step=step)

    @rank_zero_only
    def log_texts(self, pairs: list[list[str]], step: int) -> None:
        """Log a table of prompts and texts."""
        import pandas as pd  # Trackio's own requirement

        if not self._is_open:
            self._begin()
        table = self._trackio.Table(dataframe=pd.DataFrame(pairs, columns=["prompt", "text"]))
        self._trackio.log({"texts": table}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._is_open:
            self._trackio.finish()
        self._is_open = False

    def _begin(self) -> None:
        self._trackio.init(project=self._project, name=self._run_name, config=self._settings, embed=False)
        self._is_open = True


_FILES: dict[str, Callable[[Path], Logger]] = {"csv": _csv, "tensorboard": _tensorboard}
_SERVICES: dict[str, Callable[[Path, str], Logger]] = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
