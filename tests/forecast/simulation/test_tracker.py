"""The tracker counts each storage once, from its birth to its death, and knows what it was."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.forecast.simulation.tracker import Tracker
from distill.forecast.simulation.work import Speed, Work

MB = 2**20


def test_views_share_and_the_dead_are_gone() -> None:
    with Tracker("cpu") as tracker:
        one = torch.empty(MB // 4)
        other = one.view(2, -1)[0]
        assert tracker.current == MB
        del one
        assert tracker.current == MB
        del other
        assert tracker.current == 0
    assert tracker.peak().bytes == MB


def test_the_peak_is_the_most_at_one_time() -> None:
    with Tracker("cpu") as tracker:
        first = torch.empty(MB // 4)
        del first
        second, third = torch.empty(MB // 4), torch.empty(MB // 4)
        del second, third
        _last = torch.empty(MB // 4)
    assert tracker.peak().bytes == 2 * MB


@pytest.mark.parametrize(("device", "bytes"), [("cpu", 64), ("cuda", 512)])
def test_an_allocation_takes_whole_granules(device: str, bytes: int) -> None:
    with Tracker(device) as tracker:  # type: ignore[arg-type]
        before = tracker.peak().bytes
        _one = torch.empty(1)
    assert tracker.peak().bytes - before == bytes


def test_what_waits_for_backward_is_an_activation() -> None:
    with Tracker("cpu") as tracker:
        weight = torch.ones(64, 64, requires_grad=True)
        tracker.tag([weight], "weights")
        hidden = torch.ones(1024, 64) @ weight
        kept = hidden.exp()
        del hidden
        kept.sum().backward()
        assert weight.grad is not None
        tracker.tag([weight.grad], "gradients")
        _late = torch.empty(MB)  # so that the peak comes when the gradient is there
    parts = tracker.peak().parts
    assert parts["weights"] == parts["gradients"] == 64 * 64 * 4
    assert parts["activations"] >= 1024 * 64 * 4
    assert parts["temporaries"] == 4 * MB
    assert sum(parts.values()) == tracker.peak().bytes


def test_the_hosts_memory_does_not_count() -> None:
    with Tracker("cpu") as tracker:
        with tracker.host():
            there = torch.empty(MB)
        _view = there[1:]
    assert tracker.peak().bytes == 0


def test_fake_tensors_count_as_real_ones() -> None:
    def program() -> None:
        weight = torch.ones(64, 64, requires_grad=True)
        hidden = torch.nn.functional.silu(torch.ones(300, 64) @ weight)
        torch.logsumexp(hidden, -1).sum().backward()

    with Tracker("cpu") as real:
        program()
    with FakeTensorMode(), Tracker("cpu") as fake:
        program()
    assert real.peak() == fake.peak()
    assert real.work == fake.work


def test_a_kernels_own_memory_counts() -> None:
    """`logsumexp` makes all exponentials."""
    logits = torch.zeros(64, 1024)
    with Tracker("cpu") as tracker:
        torch.logsumexp(logits, -1)
    assert tracker.peak().bytes == logits.nbytes + 64 * 4


def test_matrix_products_are_counted_by_type() -> None:
    with Tracker("cpu") as tracker:
        torch.ones(4, 8, dtype=torch.bfloat16) @ torch.ones(8, 16, dtype=torch.bfloat16)
    products = [work for work in tracker.work if work.flops]
    sizes = 2 * (4 * 8 + 8 * 16 + 4 * 16)
    assert products == [Work(torch.bfloat16, 2 * 4 * 8 * 16, sizes, fresh=2 * 4 * 16)]


def test_a_selection_reads_its_input_several_times() -> None:
    values = torch.zeros(16, 1024)
    with Tracker("cpu") as tracker:
        torch.topk(values, 4)
        torch.amax(values, -1)
    selection, largest = tracker.work
    assert selection.bytes - selection.fresh == 8 * values.nbytes == 8 * (largest.bytes - largest.fresh)


def test_gradients_that_are_added_up_are_written_where_one_of_them_is() -> None:
    weight = torch.zeros(256, requires_grad=True)
    with Tracker("cpu") as tracker:
        loss = (weight * 2 + weight.exp()).sum()
        tracker.work.clear()
        loss.backward()
    sums = [work for work in tracker.work if work.bytes == 3 * weight.nbytes and not work.fresh]
    assert len(sums) == 1


def test_a_kernel_takes_what_takes_longest() -> None:
    speed = Speed({torch.float32: 100.0}, bytes=10.0, launch=0.5)
    for work, seconds in [
        (Work(torch.float32, 300, 20), 3.0),
        (Work(torch.float32, 100, 20), 2.0),
        (Work(None, 0, 1), 0.5),
    ]:
        with Tracker("cpu") as tracker:
            pass
        tracker.work[work] += 2
        assert speed.seconds(tracker.work) == pytest.approx(2 * seconds)
