"""A streamed teacher in few bits says what the resident one says; its copy survives kills, and no other is taken."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.forecast.phases.teacher import simulate_teacher
from distill.forecast.simulation.fake import without_memory
from distill.models import checkpoints, quantized_copy, together
from distill.models.checkpoints import resolve
from distill.models.quantized_copy import CopyPlan, write_copy
from distill.targets import schemes
from teachers.huggingface import load_teacher
from teachers.streamed import StreamedTeacher, load_streamed_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

MIXTURE = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 16}
ZAMBA = {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "mamba_dt_rank": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": MIXTURE,
    "gpt2": {"n_embd": 64},  # weights transposed
    "zamba": {**ZAMBA, "hidden_size": 64, "intermediate_size": 768, "mamba_d_state": 4},  # layers that share a block
}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A family's checkpoint."""
    made: dict[str, str] = {}

    def find(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            tiny_model(family, **FAMILIES[family]).save_pretrained(made[family])
        return made[family]

    return find


@torch.no_grad()
def answer(teacher: Any) -> Tensor:
    return teacher.body(torch.arange(36).reshape(3, 12), torch.arange(12).expand(3, -1))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def plan_of(folder: str, quantization: str = "nf4", dtype: torch.dtype = torch.float32) -> CopyPlan:
    return CopyPlan(resolve(folder), quantization, dtype, False, False)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_resident_and_copied_are_the_same_to_the_bit(
    folder: Any, family: str, quantization: Any, tmp_path: Path
) -> None:
    resident = load_teacher(folder(family), quantization, "bfloat16")
    copy = str(tmp_path / "copy")
    streamed = load_streamed_teacher(folder(family), quantization, "bfloat16", quantized_copy=copy)
    for _ in range(2):
        assert torch.equal(answer(streamed), answer(resident))
    some = load_streamed_teacher(copy, quantization, "bfloat16", host_memory="60KB", keep_layers=1)
    for _ in range(2):
        assert torch.equal(answer(some), answer(resident))
    assert torch.equal(answer(load_teacher(copy, quantization, "bfloat16")), answer(resident))


def test_a_layer_that_stays_in_the_hosts_memory_is_read_once(folder: Any, tmp_path: Path) -> None:
    teacher = load_streamed_teacher(
        folder("qwen3_moe"), "nf4", "float32", quantized_copy=str(tmp_path / "copy"), host_memory="1MB"
    )
    outside = teacher._reader.bytes_read  # type: ignore[union-attr]
    for _ in range(3):
        answer(teacher)
    assert teacher.bytes_read == 0 and teacher._stream.nbytes <= teacher.host_bytes
    read = teacher._reader.bytes_read - outside  # type: ignore[union-attr]
    assert 0 < read <= teacher._stream.nbytes


def killed(work: Callable[[], object], last: int) -> bool:
    """Do work in a process that kills itself at call `last` of those that change files; False: it was done before."""
    child = os.fork()
    if child == 0:
        steps = itertools.count()

        def killing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(steps) == last:
                    if name == "save_file":
                        Path(arguments[1]).write_bytes(b"half a file")
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        try:
            quantized_copy.save_file = killing("save_file", quantized_copy.save_file)
            for name in ("fsync", "replace", "unlink"):
                setattr(os, name, killing(name, getattr(os, name)))
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_copy_whose_writer_was_killed_is_continued_to_the_same_bytes(folder: Any, tmp_path: Path) -> None:
    """Each start goes on from what the one before left, and is killed four calls later."""
    plan, copy = plan_of(folder("qwen3_moe")), tmp_path / "killed"
    write_copy(plan, tmp_path / "undisturbed")
    names, kills, half = ["layer-00000.safetensors", "layer-00001.safetensors"], 0, 0
    seen: dict[str, int] = {}
    while killed(lambda: write_copy(plan, copy), 4 + 4 * kills):
        kills += 1
        half += any(path.name.endswith(".tmp") for path in copy.iterdir())
        for name in names:
            if (copy / name).is_file():
                stamp = (copy / name).stat().st_mtime_ns
                assert seen.setdefault(name, stamp) == stamp, "what was finished is not made again"
        with pytest.raises(UserError, match=r"is not finished: run the same `distill quantize` again"):
            load_teacher(str(copy), "nf4", "float32")
    assert kills > 3 and half and set(seen) == set(names)
    assert contents(copy) == contents(tmp_path / "undisturbed")


def test_a_damaged_file_is_found_and_made_again(folder: Any, tmp_path: Path) -> None:
    plan, copy = plan_of(folder("qwen3_moe")), tmp_path / "copy"
    write_copy(plan, copy)
    before = contents(copy)
    assert checkpoints.fingerprints(resolve(str(copy))) == checkpoints.fingerprints(resolve(folder("qwen3_moe")))
    damaged = bytearray(before["layer-00001.safetensors"])
    damaged[-1] ^= 1
    (copy / "layer-00001.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match=r"layer-00001.safetensors is missing or damaged"):
        checkpoints.fingerprints(resolve(str(copy)))
    with pytest.raises(UserError, match=r"layer-00001.safetensors is missing or damaged"):
        load_streamed_teacher(folder("qwen3_moe"), "nf4", "float32", quantized_copy=str(copy))
    write_copy(plan, copy)
    assert contents(copy) == before


def test_a_copy_of_something_else_is_refused(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = str(tmp_path / "copy")
    write_copy(plan_of(folder("qwen3_moe")), tmp_path / "copy")
    with pytest.raises(ValueError, match=r"is a copy in nf4: set teacher.quantization"):
        load_teacher(copy, "int8", "float32")
    with pytest.raises(ValueError, match=r"is a copy for float32: .*--compute_dtype bfloat16"):
        load_streamed_teacher(copy, "nf4", "bfloat16")
    with pytest.raises(UserError, match="of another checkpoint, in another quantisation"):
        load_streamed_teacher(folder("gpt2"), "nf4", "float32", quantized_copy=copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds other files \(such as thesis.txt\)"):
        write_copy(plan_of(folder("gpt2")), tmp_path / "mine")
    manifest = json.loads((tmp_path / "copy/quantized.json").read_text())
    (tmp_path / "copy/quantized.json").write_text(json.dumps({**manifest, "files": {"../x.safetensors": "0" * 64}}))
    with pytest.raises(UserError, match="damaged, or of another version"):
        load_teacher(copy, "nf4", "float32")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the quantised copy takes .* more, 1 kB are free"):
        load_streamed_teacher(folder("gpt2"), "nf4", "float32", quantized_copy=str(tmp_path / "new"))


def test_a_forecast_reads_the_bytes_of_the_copy(folder: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantized_copy": str(tmp_path / "copy"), "host_memory": "60KB", "keep_layers": 1}
    loaded = load_streamed_teacher(folder("qwen3_moe"), "nf4", "float32", **options)
    with without_memory("cpu"):
        shape = load_streamed_teacher(folder("qwen3_moe"), "nf4", "float32", **options)

    def held(teacher: StreamedTeacher) -> tuple[int, ...]:
        resident = sum(p.nbytes for p in teacher.parameters() if not p.is_meta)
        return teacher.bytes_read, teacher.host_bytes, resident - teacher._stream.largest * (teacher is shape)

    assert loaded.bytes_read > 0 and held(shape)[:2] == held(loaded)[:2]
    assert shape.copy_bytes == loaded.copy_bytes > loaded.bytes_read


def test_a_forecast_counts_what_stays_on_the_card(folder: Any) -> None:
    model = folder("qwen3_moe")
    found = simulate_teacher(
        lambda: load_streamed_teacher(model, "nf4", "bfloat16"),
        batch_size=2,
        length=16,
        vocab_size=99,
        scheme=schemes.make("varopt", threshold=0.02),
        chunk_size=32,
        device="cuda",
    )
    layer = 30_000
    assert found.parts["weights"] >= 2 * 99 * 64 * 2 + layer, "embedding, head and a layer"


def test_from_the_command_line(world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is made by itself or by `distill quantize`; the cache is that of the resident teacher, byte for byte.

    So it is if several batches go through the layers together.
    """
    file, model = world.write(tmp_path / "experiment.yaml"), world.content["teacher"]["model"]
    outcome = distill("quantize", model, "--to", tmp_path / "copy", "--compute_dtype", "float32").done()
    assert "is complete" in outcome.out
    distill("quantize", model, "--to", tmp_path / "copy").refused("of another checkpoint, in another quantisation")
    streamed = ["--teacher.class_path", "streamed"]
    ways: dict[str, list[str]] = {
        "resident": [],
        "by itself": streamed,
        "copy": [*streamed, "--teacher.model", str(tmp_path / "copy")],
        "together": [*streamed, "--teacher.model", str(tmp_path / "copy")],
    }
    made, counts, bodies = [], [], StreamedTeacher.bodies

    def counting(self: StreamedTeacher, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        counts.append([len(ids_BL) for ids_BL, _ in groups])
        return bodies(self, groups)

    monkeypatch.setattr(StreamedTeacher, "bodies", counting)
    for name, options in ways.items():
        run = tmp_path / name
        monkeypatch.setattr(together, "READING", -1 if name == "together" else 1e9)
        distill(
            "cache-teacher", file, "--run_dir", run, "--cache.max_samples", 8, "--teacher.quantization", "nf4", *options
        ).done()
        made.append({path.name: path.read_bytes() for path in sorted((run / "cache").rglob("*.safetensors"))})
    assert made[0] == made[1] == made[2] == made[3] and made[0]
    assert counts == [[4, 4]]
    assert (tmp_path / "by itself/quantized-teacher/quantized.json").is_file()
