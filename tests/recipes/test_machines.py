"""Several machines that work together: one that waits for another says so, and ends at one signal."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(("rank", "signum"), [(0, signal.SIGTERM), (1, signal.SIGINT)], ids=["first", "second"])
def test_a_missing_machine_is_told_and_one_signal_ends_the_wait(
    world: Any, stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, signum: signal.Signals
) -> None:
    """The machine of rank 0 waits for the others to come, the others for its port to answer."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("NODE_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    file = world.write(tmp_path / "experiment.yaml")
    command = ["cache-teacher", file, "--cache.num_nodes", "2"]
    stopped = stop(signum, lambda said: "waiting until" in said, *command)
    assert f"waiting until all 2 machines (num_nodes) have met at 127.0.0.1:{port} (MASTER_ADDR" in stopped.out
    assert f"NODE_RANK {rank}:" in stopped.out
    assert stopped.status == 130 and stopped.err.startswith("\nstopped while waiting"), stopped
    assert "Traceback" not in stopped.err
