"""SLURM: its restarts of a job, the request for another, and Lightning's own requeue switched off."""

from __future__ import annotations

import os
import subprocess
from typing import Any


def is_a_job() -> bool:
    """Return whether this process belongs to a job of SLURM."""
    return "SLURM_JOB_ID" in os.environ


def is_restarted() -> bool:
    """Return whether SLURM has started this job before, so that the same command must resume."""
    return is_a_job() and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeue() -> str:
    """Ask SLURM to queue this job again, once for all its processes, and return a message about it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    if os.environ.get("SLURM_PROCID", "0") == "0":
        try:
            asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"job {job} could not be queued again ({error})"
        if asked.returncode:
            return f"job {job} could not be queued again ({asked.stderr.strip() or asked.returncode})"
    return f"job {job} is queued again and resumes by itself"


def trainer_options() -> dict[str, Any]:
    """Return the arguments that switch Lightning's requeue off in a job, for its `Trainer`; empty elsewhere.

    Lightning's requeue would write `hpc_ckpt_1.ckpt` into the current folder, and any Trainer that starts there later
    would load it.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    if not SLURMEnvironment.detect():
        return {}
    # Lightning looks for hpc_ckpt files in its root folder whatever `auto_requeue` says. Below a file there are none.
    nowhere = os.path.join(os.path.abspath(__file__), "none")
    return {"plugins": [SLURMEnvironment(auto_requeue=False)], "default_root_dir": nowhere}
