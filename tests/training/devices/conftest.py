"""Trainings by one process and by two gloo processes, for the tests beside this file, which compare what they saw.

The two processes are one script, this file, which trains all of `CASES` under ddp and under fsdp one after the other.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from distill.cache.format.records import Record
from distill.cache.making.extract import extract
from distill.cache.reading.batches import Batch, collate
from distill.losses.objective import Mixture
from distill.models.language_model import Head
from distill.targets import schemes
from distill.training.guards import NonFinite
from distill.training.module import DistillationModule
from distill.training.optimizers.adamw import NO_DECAY, make_optimizer
from distill.training.optimizers.schedule import Schedule
from distill.training.order import NOTHING, share
from distill.training.parallel import make_strategy
from students.compact import CompactDecoder

V, D, L = 37, 8, 12
STEP, SAMPLES = 16, 49
POISON = V - 1
"""A token that occurs in one sample only; a student may find it indigestible."""
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


class NoBlocks(nn.Module):
    """All weights in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.output = nn.Linear(D, V + 5)

    @property
    def head(self) -> Head:
        return Head(self.output.weight, self.output.bias)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        return torch.tanh(self.embedding(input_ids_BL))


class Balanced(NoBlocks):
    """With an auxiliary loss, which is measured on each sample."""

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Any:
        hidden_BLD = torch.tanh(self.embedding(input_ids_BL))
        return hidden_BLD, L * (hidden_BLD.mean(1) - 0.5).square().sum()


class Poisoned(NoBlocks):
    """Infinite where it reads POISON."""

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        return super().body(input_ids_BL, position_ids_BL) / (input_ids_BL != POISON)[..., None]


class Narrow(NoBlocks):
    """In process 1 there is no room for its second pass, which is of the third step, after one that succeeds."""

    passes = 0

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        self.passes += 1
        if int(os.environ.get("LOCAL_RANK", 0)) == 1 and self.passes == 2:
            raise torch.OutOfMemoryError("no room")
        return super().body(input_ids_BL, position_ids_BL)


@dataclass(frozen=True)
class Case:
    """A training of `epochs` over all samples, in passes of `micro_batch`."""

    micro_batch: int = 4
    packed: bool = True
    scheme: str = "varopt"
    student: str = "compact"
    epochs: int = 1
    optimizer: str = "sgd"
    module: dict[str, Any] = field(default_factory=dict)


CASES = {
    **{
        f"{'packed' if packed else 'unpacked'} {micro_batch}": Case(micro_batch, packed)
        for packed in (True, False)
        for micro_batch in (1, 2, 4, 8)
    },
    "curve": Case(epochs=3, optimizer="adamw", module={"gradient_clip": 0.2}),
    "features": Case(scheme="hidden", module={"feature_weight": 0.5, "gradient_clip": 0.2}),
    "no blocks": Case(student="NoBlocks"),
    "auxiliary": Case(student="Balanced", micro_batch=2),
    "not finite": Case(student="Poisoned", module={"non_finite": "skip"}),
    "narrow": Case(student="Narrow", epochs=2),
}


def make_records(scheme: Any, packed: bool) -> list[Record]:
    """Unevenly masked samples. In the first step, the second half has no position; in the second step no sample has."""
    generator = torch.Generator().manual_seed(5)
    head = Head(torch.randn(V, D, generator=generator) * 2)
    made = []
    for number in range(SAMPLES):
        ids_L = torch.randint(POISON, (L,), generator=generator)
        ids_L[3] = POISON if number == 44 else ids_L[3]
        first = int(torch.randint(1, L, (), generator=generator)) if packed else L
        positions_L = torch.cat([torch.arange(first), torch.arange(L - first)])
        is_empty = 8 <= number < 32
        mask_L = torch.rand(L, generator=generator) < (0 if is_empty else (1, 0.1, 0.7, 0, 0.9)[(number + 1) % 5])
        mask_L[[first - 1, L - 1]] = False
        hidden_LD = torch.randn(L, D, generator=generator)
        made.append(extract(hidden_LD, head, ids_L, positions_L, mask_L, scheme, seed=0))
    return made


class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """One process's share of each step, as the data module deals it."""

    def __init__(self, records: list[Record], scheme: Any, rank: int, world: int) -> None:
        self.records, self.scheme, self.rank, self.world = records, scheme, rank, world

    def __iter__(self) -> Iterator[Batch]:
        for places in share(SAMPLES, STEP // self.world, self.rank, self.world):
            if places[0] == NOTHING:
                yield collate(self.records[:1]).without_loss()
            else:
                yield collate([self.records[place] for place in places])


class Watch(pl.Callback):
    """A record of the steps."""

    def __init__(self) -> None:
        kinds = ("loss", "norm", "gradient", "seed of passes", "seed of rounding", "micro_batch")
        self.seen: dict[str, list[Any]] = {kind: [] for kind in kinds}

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if torch.initial_seed() not in self.seen["seed of passes"][-1:]:
            self.seen["seed of passes"].append(torch.initial_seed())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen["seed of rounding"].append(torch.initial_seed())
        self.seen["gradient"].append(flat(p.grad for p in pl_module.parameters() if p.grad is not None))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.seen["loss"].append(float(trainer.callback_metrics["loss"]))
        self.seen["norm"].append(float(trainer.callback_metrics["gradient_norm"]))
        self.seen["micro_batch"].append(pl_module.micro_batch)


def flat(tensors: Any) -> Tensor:
    """As one vector, whole on every device."""
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in tensors]
    return torch.cat([x.detach().flatten().clone() for x in whole])


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    "adamw": lambda module: make_optimizer(
        module, name="adamw", learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.999)
    ),
}
STUDENTS: dict[str, Any] = {
    "compact": lambda: CompactDecoder(V + 5, hidden_size=D, layers=2, heads=2, intermediate_size=16),
    **{kind.__name__: kind for kind in (NoBlocks, Balanced, Poisoned, Narrow)},
}


def make_module(case: Case) -> DistillationModule:
    torch.manual_seed(0)
    settings = {**case.module}
    if "non_finite" in settings:
        settings["non_finite"] = NonFinite(settings["non_finite"])
    if case.scheme == "hidden":
        settings["teacher_head"] = Head(torch.randn(V, D) * 2)
    student = STUDENTS[case.student]()
    setattr(next(student.parameters()), NO_DECAY, True)  # on every device
    return DistillationModule(
        student,
        vocab_size=V,
        objective=Mixture(0.3),
        chunk_size=3,
        micro_batch=case.micro_batch,
        make_optimizer=OPTIMIZERS[case.optimizer],
        make_schedule=lambda total: Schedule("cosine", total, 0.0, 0.2, 1.0),
        **settings,
    )


def trained(case: Case, strategy: str = "auto", world: int = 1) -> dict[str, Any]:
    """Everything that is seen of a training in one of its processes."""
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=make_strategy(strategy, world),
        max_epochs=case.epochs,
        use_distributed_sampler=False,
        callbacks=[watch],
        **QUIET,
    )
    scheme = schemes.make(case.scheme, **({"threshold": 0.1} if case.scheme == "varopt" else {"size": D}))
    batches = Batches(make_records(scheme, case.packed), scheme, trainer.global_rank, world)
    module = make_module(case)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    # The first and the last step; after the measurement shares may still be gathered, and a second must not mind.
    measured = [module.measure([batch]) for _ in range(2) for number, batch in enumerate(batches) if number in (0, 3)]
    return {**watch.seen, "weights": flat(module.student.parameters()), "measured": measured}


def main(folder: str, port: str) -> None:
    """Two processes, which share the time that imports take, train every case under either strategy."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", NODE_RANK="0")
    child = os.fork()
    rank = 0 if child else 1
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    for strategy in ("ddp", "fsdp"):
        for name, case in CASES.items():
            if (strategy, name) != ("fsdp", "narrow"):
                torch.save(trained(case, strategy, 2), f"{folder}/{strategy} {name} {rank}.pt")
    torch.distributed.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[dict[str, Any]]]:
    """`both(strategy, name)`: what each of the two processes saw of a case."""
    folder = tmp_path_factory.mktemp("both")
    root = Path(__file__).resolve().parents[3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, __file__, folder, port],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return lambda strategy, name: [
        torch.load(folder / f"{strategy} {name} {rank}.pt", weights_only=True) for rank in range(2)
    ]


@pytest.fixture(scope="session")
def one() -> dict[str, dict[str, Any]]:
    """One process, every case."""
    return {name: on_one_thread(case) for name, case in CASES.items()}


@pytest.fixture(scope="session")
def in_one_pass() -> Callable[[bool], dict[str, Any]]:
    """`in_one_pass(packed)`: one process with all samples of a step in one pass."""
    return lambda packed: on_one_thread(Case(STEP, packed))


def on_one_thread(case: Case) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trained(case)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def check_same() -> Callable[..., None]:
    """`check_same(found, expected)`: two trainings are one, but for the rounding of another order of sums."""

    def check(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
        for key in ("loss", "norm"):
            assert found[key] == pytest.approx(expected[key], rel=tolerance, nan_ok=True), key
        for key in ("gradient", "weights"):
            pairs = zip(found[key], expected[key], strict=True) if key == "gradient" else [(found[key], expected[key])]
            for ours, theirs in pairs:
                assert (ours - theirs).norm() <= tolerance * theirs.norm()
        for ours, theirs in zip(found["measured"], expected["measured"], strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance)

    return check


if __name__ == "__main__":
    main(*sys.argv[1:])
