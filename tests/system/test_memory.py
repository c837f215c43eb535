"""Memory of machine and process, and the errors by which it runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.system import memory


def test_the_peak_is_that_of_linux_or_that_since_the_process_began(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t 9 kB\nVmHWM:\t 2048 kB\nVmRSS:\t 7 kB\n")
    assert memory.peak_memory(tmp_path / "status") == 2 << 20
    held = torch.ones(1000)
    peak = memory.peak_memory(tmp_path / "nowhere")
    assert peak is not None and held.nbytes < 10 << 20 < peak < 1 << 42


def test_what_is_held_is_part_of_the_machines(tmp_path: Path) -> None:
    before = memory.held_memory()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    peak = memory.peak_memory()
    assert before + held.nbytes // 2 < memory.held_memory() < memory.memory_of_host()
    assert peak is not None and peak > before + held.nbytes // 2
    assert 0 < memory.available_memory() <= memory.memory_of_host()


def test_a_container_has_its_limit(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    physical = memory.memory_of_host(limit)
    for text, expected in (("max\n", physical), ("1048576\n", 1 << 20), (f"{1 << 60}\n", physical)):
        limit.write_text(text)
        assert memory.memory_of_host(limit) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_only_a_lack_of_memory_is_one(error: BaseException, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_torch_says_so_on_the_host() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)
