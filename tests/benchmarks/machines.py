"""Makes one cache and one student on two "machines" of the loopback in each way there is, and compares the bytes.

    python tests/benchmarks/machines.py

The ways are parts that are merged, `num_nodes` with MASTER_ADDR, torchrun, and two tasks of SLURM (its variables,
without its programs). Caches are compared with one machine's, students with those of
one machine with two devices. Prints a table;
exit status 1 when a way made other bytes, or ended otherwise than with success.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from forked import write_experiment

PORT = "29561"
DISTILL = [sys.executable, "-m", "distill"]
ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--train.batch_size", "2"]
SMALL = {
    "corpus": {"sequence_length": 48},
    "teacher": {"compute_dtype": "float32"},
    "cache": {"batch_size": 4, "shard_samples": 8, "held_out_samples": 4, "max_samples": 32},
    "train": {"batch_size": 4, "max_steps": 8, "precision": "32-true"},
    "preflight": False,
}


def together(commands: list[list[str]], variables: list[dict[str, str]]) -> str:
    """Run commands side by side, each with its own variables, and return the error of one that failed, if any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            command, env={**environment, **own}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for command, own in zip(commands, variables, strict=True)
    ]
    errors = [process.communicate()[1].strip() for process in started]
    return next((error[-300:] for process, error in zip(started, errors, strict=True) if process.returncode), "")


def digest(folder: Path) -> str:
    """Return a hash of a model's weights, or of all files of a cache by name."""
    found, weights = hashlib.sha256(), folder / "model.safetensors"
    for path in [weights] if weights.exists() else sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def main() -> int:
    work = Path(tempfile.mkdtemp(prefix="machines-"))
    file = str(write_experiment(work, **SMALL))
    masters = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "NODE_RANK": str(rank)} for rank in (0, 1)]
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "distill", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in (0, 1)]

    def cache(run: str, *more: str) -> list[str]:
        return [*DISTILL, "cache-teacher", file, "--run_dir", str(work / run), *more]

    def train(run: str, *more: str) -> list[str]:
        own = ["--run_dir", str(work / run), "--cache.dir", str(work / "one/cache")]
        return [*DISTILL, "train-student", file, *own, *more]

    together([cache("one")], [{}])
    # One device makes a step's sum in another order than two do.
    two = [*TRAIN, "--train.num_nodes", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    ways = [
        ("cache: two parts, merged", [cache(f"part{n}", "--cache.part", f"{n}/2") for n in (1, 2)], [{}, {}], "merged"),
        ("cache: num_nodes 2", [cache("nodes", "--cache.num_nodes", "2")] * 2, masters, "nodes/cache"),
        ("cache: SLURM, 2 tasks", [cache("slurm", "--cache.num_nodes", "2")] * 2, tasks, "slurm/cache"),
        ("student: devices 2", [train("devices", *TRAIN, "--train.devices", "2")], [{}], "devices/student"),
        ("student: num_nodes 2", [train("nodes", *two)] * 2, masters, "nodes/student"),
        (
            "student: torchrun, 2 processes",
            [[*torchrun, *train("torchrun", *TRAIN, "--train.devices", "2")[1:]]],
            [{}],
            "torchrun/student",
        ),
        ("student: SLURM, 2 tasks", [train("slurm", *two)] * 2, tasks, "slurm/student"),
    ]
    print("| way | bytes |\n|---|---|")
    status = 0
    for name, commands, variables, made in ways:
        error = together(commands, variables)
        if made == "merged" and not error:
            parts = [str(work / f"part{n}") for n in (1, 2)]
            error = together([[*DISTILL, "merge", *parts, "--to", str(work / made)]], [{}])
        wanted = work / ("one/cache" if name.startswith("cache") else "devices/student")
        same = not error and digest(work / made) == digest(wanted)
        print(f"| {name} | {'the same' if same else error or 'others'} |", flush=True)
        status = status if same else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
