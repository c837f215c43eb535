"""A job of SLURM: stopped by SIGUSR1 and queued again, it resumes by the same command, from our checkpoints alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.system import slurm

JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "distill",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this process a job of SLURM, in a folder of its own, and return the file that `scontrol` notes calls in."""
    (tmp_path / "bin").mkdir()
    calls, scontrol = tmp_path / "calls", tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return calls


def test_a_job_is_queued_again_and_resumes_by_the_same_command(
    finished: Any, distill: Any, stop: Any, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--train.epochs", "4", "--train.validate_every_steps", "5", "--evaluate.control", "false"]
    run = tmp_path / "run"
    arguments = [*finished.elsewhere(run), *more]
    stopped = stop(signal.SIGUSR1, lambda out: "step 5: held-out KL" in out, "train-student", *arguments)
    assert stopped.status == 130 and "job 77 is queued again and resumes by itself" in stopped.err, stopped
    assert calls.read_text() == "requeue 77\n"
    assert not (run / "student").exists() and not list(Path.cwd().glob("hpc_ckpt*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "student: continuing from" in distill("train-student", *arguments).done().out
    undisturbed = tmp_path / "undisturbed"
    distill("train-student", *finished.elsewhere(undisturbed), *more).done()
    ours, theirs = (load_file(folder / "student/model.safetensors") for folder in (run, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_lightnings_requeue_in_the_current_folder_is_not_read(
    world: Any, distill: Any, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the teacher's pass nor by the training, whose first start is from nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of another experiment")
    file = world.write(tmp_path / "experiment.yaml", train={"max_steps": 2})
    distill("cache-teacher", file).done()
    distill("train-student", file).done()
    assert not calls.exists()


@pytest.mark.parametrize(("process", "asked"), [("0", True), ("1", False)])
def test_one_process_of_a_job_asks_and_names_the_task_of_an_array(
    calls: Path, monkeypatch: pytest.MonkeyPatch, process: str, asked: bool
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_PROCID", process)
    assert "70_3 is queued again" in slurm.requeue()
    assert calls.exists() == asked and (not asked or calls.read_text() == "requeue 70_3\n")


def test_a_job_that_cannot_be_queued_again_says_so(
    calls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho 'Requeue is disabled' >&2; exit 1\n")
    assert slurm.requeue() == "job 77 could not be queued again (Requeue is disabled)"
