"""Curves and settings arrive where they were asked to go, each start in a log of its own, from one process only."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from distill.cache.reading.batches import collate
from distill.errors import UserError
from distill.training.loggers import TrackioLogger, check_installed, check_loggers, make_loggers
from distill.training.trainer import make_trainer

SETTINGS = {"alpha": 0.3, "train": {"optimizer": "adamw", "max_steps": None, "betas": [0.9, 0.95]}}
SERVICES = ["wandb", "mlflow", "trackio"]


class Measure(Callback):
    """Logs at the end, as the held-out measurement does; fails where it is told to."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_train_batch_start(self, *arguments: Any) -> None:
        if self.error:
            raise self.error

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"held_out_kl": 0.25}, step=pl_module.steps_begun)


@pytest.fixture
def fit(make_module: Any, make_student: Any, records: Any) -> Callable[..., None]:
    """`fit(loggers)`: a training of five steps."""

    def train(loggers: list[Logger], error: BaseException | None = None) -> None:
        trainer = make_trainer(
            accelerator="cpu",
            devices=1,
            num_nodes=1,
            strategy="auto",
            precision="32-true",
            epochs=1,
            max_steps=None,
            log_every_steps=1,
            loggers=loggers,
            callbacks=[Measure(error)],
        )
        loader = DataLoader(records, 2, collate_fn=collate)
        trainer.fit(make_module(make_student()), loader)

    return train


def curve(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("names", [["tensorboard", "csv"], ["csv", "tensorboard", "csv"]])
@pytest.mark.filterwarnings("error:Experiment logs directory")
def test_curves_and_settings_in_files(tmp_path: Path, fit: Any, names: list[str]) -> None:
    fit(make_loggers(names, tmp_path / "logs/student", "demo", SETTINGS))
    folder = tmp_path / "logs/student"
    events = [path.name for path in folder.iterdir() if path.name.startswith("events.out.tfevents")]
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "hparams.yaml", *events} and len(events) == 1
    rows = curve(folder / "metrics.csv")
    assert [row["step"] for row in rows if row["loss"]] == ["0", "1", "2", "3", "4"]
    assert [row["held_out_kl"] for row in rows if row["held_out_kl"]] == ["0.25"]
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == SETTINGS
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in seen.Scalars("held_out_kl")] == [5]
    noted = str(seen.PluginTagToContent("hparams"))
    assert "train/optimizer" in noted and "adamw" in noted


def test_no_logger_leaves_nothing(tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(make_loggers([], tmp_path / "logs", "demo", SETTINGS))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_earlier_curve_gets_a_number(tmp_path: Path, fit: Any) -> None:
    for start in range(3):
        fit(make_loggers(["csv"], tmp_path, "demo", {"start": start}))
    (tmp_path / "metrics.best.csv").touch()
    make_loggers(["csv"], tmp_path, "demo", {})
    expected = {"metrics.1.csv", "metrics.2.csv", "metrics.3.csv", "metrics.best.csv"}
    assert {path.name for path in tmp_path.glob("*.csv")} == expected
    assert all(len(curve(tmp_path / f"metrics.{number}.csv")) == 6 for number in (1, 2, 3))


def test_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").touch()
    monkeypatch.setenv("NODE_RANK", "1")
    assert make_loggers(["csv", "tensorboard", *SERVICES], tmp_path, "demo", SETTINGS) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_not_installed_is_said_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as refused:
        make_loggers(["csv", name], tmp_path / "logs", "demo", SETTINGS)
    assert f"train.loggers: {name} is not installed" in str(refused.value) and f"pip install {name}" in str(
        refused.value
    )
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "logs").exists()
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_installed(["tensorboard", name])
    check_loggers(["tensorboard", "csv"])


def test_a_service_that_lightning_finds_too_old_is_found_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    check_installed(["mlflow"])
    with pytest.raises(UserError, match=r"^train\.loggers: mlflow is not installed"):
        check_loggers(["csv", "mlflow"])


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for Trackio, and keep its calls."""
    told: list[Any] = []
    module: Any = ModuleType("trackio")
    module.init = lambda **arguments: told.append(("init", arguments))
    module.log = lambda metrics, step=None: told.append(("log", step, metrics))
    module.finish = lambda: told.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return told


def test_trackio_is_told_the_settings_each_value_and_the_end(tmp_path: Path, fit: Any, trackio: list[Any]) -> None:
    fit(make_loggers(["trackio"], tmp_path, "demo", SETTINGS))
    assert trackio[0] == ("init", {"project": "distill", "name": "demo", "config": SETTINGS, "embed": False})
    losses = [(step, metrics["loss"]) for kind, step, metrics in trackio[1:-1] if "loss" in metrics]
    assert [step for step, _ in losses] == [0, 1, 2, 3, 4] and all(isinstance(loss, float) for _, loss in losses)
    assert trackio[-2:] == [("log", 5, {"held_out_kl": 0.25}), ("finish",)]


def test_trackio_ends_with_a_training_that_failed(tmp_path: Path, fit: Any, trackio: list[Any]) -> None:
    with pytest.raises(ValueError, match="the work"):
        fit(make_loggers(["trackio"], tmp_path, "demo", SETTINGS), ValueError("the work"))
    assert [kind for kind, *_ in trackio] == ["init", "finish"]


def test_trackio_begins_by_itself_in_a_notebook(trackio: list[Any]) -> None:
    logger = TrackioLogger("mine", "first")
    logger.log_metrics({"loss": 1.0}, step=3)
    logger.finalize("success")
    logger.finalize("success")
    assert [kind for kind, *_ in trackio] == ["init", "log", "finish"]
    assert (logger.name, logger.version) == ("mine", "first")


def test_a_service_that_cannot_begin_is_named(
    tmp_path: Path, trackio: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**arguments: Any) -> None:
        raise RuntimeError("no account\nand many more lines")

    monkeypatch.setattr(sys.modules["trackio"], "init", init)
    with pytest.raises(
        UserError, match=r"^train\.loggers: trackio cannot begin: no account: mend that, or leave trackio out$"
    ):
        make_loggers(["trackio"], tmp_path, "demo", SETTINGS)


# The services themselves, where they are installed.


def test_two_trainings_are_two_runs_of_wandb(tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for role in ("student", "control"):
        (logger,) = make_loggers(["wandb"], tmp_path, f"demo-{role}", SETTINGS)
        run: Any = logger.experiment
        assert (run.name, run.project, run.config["train"]["optimizer"]) == (f"demo-{role}", "distill", "adamw")
        fit([logger])
    wandb.teardown()  # its own process has written all when it has ended
    runs = [path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert sorted(b"demo-student" in run for run in runs) == [False, True]
    assert all(b"held_out_kl" in run and b"adamw" in run for run in runs)


BEGIN = """
import sys
from pathlib import Path
from distill.errors import UserError
from distill.training.loggers import check_loggers, make_loggers
try:
    check_loggers(["wandb"]) if sys.argv[2] == "before" else make_loggers(["wandb"], Path(sys.argv[1]), "demo", {})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("when", ["before", "at the start"])
def test_wandb_without_an_account_is_one_line(tmp_path: Path, when: str) -> None:
    pytest.importorskip("wandb")
    home = {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    environment = {**{name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}, **home}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN, tmp_path, when],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("train.loggers: wandb cannot begin: ") and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("error", [None, ValueError("the work")])
def test_mlflow_keeps_a_database_in_the_folder(
    tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (logger,) = make_loggers(["mlflow"], tmp_path / "logs", "demo", SETTINGS)
    if error is None:
        fit([logger])
    else:
        with pytest.raises(ValueError, match="the work"):
            fit([logger], error)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"] and (tmp_path / "logs/mlflow.db").is_file()
    client: Any = logger.experiment
    run = client.get_run(logger.version)
    assert run.info.status == ("FAILED" if error else "FINISHED") and run.info.run_name == "demo"
    assert run.data.params["train/optimizer"] == "adamw"
    assert run.data.metrics.get("held_out_kl") == (None if error else 0.25)


def test_trackio_keeps_a_run_a_start(tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    for start in range(2):
        fit(make_loggers(["trackio"], tmp_path / "logs", "demo", {"start": start}))
    runs = trackio.Api().runs("distill")
    assert [run.name for run in runs] == ["demo", "demo"]
