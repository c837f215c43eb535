"""`distill train-student`: every kind of student, every lever of training, and what cannot be trained."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS = 25  # an epoch of the finished cache: 99 samples in batches of 4


def options(**values: Any) -> list[str]:
    return ["--student.options", json.dumps(values)]


def logged(run: Path, column: str, role: str = "student") -> list[float]:
    with open(run / "logs" / role / "metrics.csv", encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def checkpoint(run: Path, pattern: str = "step-*.ckpt") -> dict[str, Any]:
    """The newest of those."""
    return torch.load(max((run / "checkpoints/student").glob(pattern)), map_location="cpu", weights_only=True)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pruned", {"layers": [0, 3]}),
        ("compact", {"hidden_size": 16, "layers": 1, "heads": 2}),
        ("huggingface", {"config": LLAMA}),
        ("huggingface", {"config": GPT2}),
    ],
    ids=["pruned", "compact", "llama", "gpt2"],
)
def test_every_kind_of_student_trains_and_is_measured(
    train: Any, distill: Any, finished: Any, tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    chosen = ["--student.class_path", name, *options(**arguments), "--evaluate.control", "false"]
    train(*chosen).done()
    assert (tmp_path / "run/student" / ("student.json" if name == "compact" else "config.json")).is_file()
    distill("evaluate", *finished.elsewhere(tmp_path / "run"), *chosen).done()
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert result["fidelity"]["student"]["kl"] < result["fidelity"]["before"]["kl"]


def test_a_pretrained_student(train: Any, world: Any, make_teacher: Any, tmp_path: Path) -> None:
    small = make_teacher("llama", num_hidden_layers=1, seed=1)
    chosen = ["--student.class_path", "huggingface", *options(model=str(small)), "--train.max_steps", 2]
    train(*chosen, "--train.learning_rate", 0).done()
    trained, given = (load_file(Path(f) / "model.safetensors") for f in (tmp_path / "run/student", small))
    assert all(torch.equal(trained[name], given[name]) for name in given)


@pytest.fixture(scope="session")
def plain(finished: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without any lever, to compare with."""
    run = tmp_path_factory.mktemp("plain") / "run"
    own = [*finished.elsewhere(run), "--evaluate.control", "false", "--train.max_steps", "6"]
    distill("train-student", *own).done()
    return run


@pytest.mark.parametrize(
    ("lever", "dtype", "tolerance"),
    [
        (["--train.precision", "bf16-mixed"], torch.float32, 3e-2),
        (["--train.precision", "bf16-true"], torch.bfloat16, 5e-2),
        (["--train.precision", "bf16-true", "--train.rounding", "kahan"], torch.bfloat16, 5e-2),
        (["--train.activation_checkpointing"], torch.float32, 1e-6),
        (["--train.activation_checkpointing", "--train.checkpoint_every_k", "2"], torch.float32, 1e-6),
        (["--train.optimizer", "adamw_8bit"], torch.float32, 5e-2),
        (["--train.batch_size", "2", "--train.accumulate_grad_batches", "2"], torch.float32, 1e-3),
        (["--train.num_workers", "1"], torch.float32, 0.0),
        (["--loss.chunk_size", "7"], torch.float32, 1e-3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_lever_of_memory_changes_the_training_by_rounding_alone(
    train: Any, plain: Path, tmp_path: Path, lever: list[str], dtype: torch.dtype, tolerance: float
) -> None:
    train("--train.max_steps", 6, *lever).done()
    ours = load_file(tmp_path / "run/student/model.safetensors")
    theirs = load_file(plain / "student/model.safetensors")
    for name, theirs_x in theirs.items():
        assert ours[name].dtype == dtype
        distance = torch.linalg.vector_norm(ours[name].float() - theirs_x) / torch.linalg.vector_norm(theirs_x)
        assert distance <= tolerance, (name, float(distance))
    assert checkpoint(tmp_path / "run")["global_step"] == 6
    for column in ("loss", "held_out_kl", "held_out_loss"):
        values = logged(tmp_path / "run", column)
        assert values and all(math.isfinite(value) and value > 0 for value in values)
        assert values == pytest.approx(logged(plain, column), rel=max(tolerance, 1e-6))


def test_the_step_in_the_backward_pass_is_the_same_step(train: Any, tmp_path: Path) -> None:
    own = ["--train.max_steps", 6, "--train.gradient_clip", 0]
    for run, lever in (("after", "false"), ("within", "true")):
        train(*own, "--run_dir", tmp_path / run, "--train.step_in_backward", lever).done()
    after, within = (load_file(tmp_path / run / "student/model.safetensors") for run in ("after", "within"))
    assert all(torch.equal(after[name], within[name]) for name in after)
    train("--train.step_in_backward").refused("step_in_backward", "train.gradient_clip 0")


def test_the_schedule_is_the_one_asked_for(train: Any, tmp_path: Path) -> None:
    def final_rate(run: str, *arguments: object) -> float:
        train("--run_dir", tmp_path / run, "--train.learning_rate", 1e-3, *arguments).done()
        return float(checkpoint(tmp_path / run)["optimizer_states"][0]["param_groups"][0]["lr"])

    stable = final_rate("stable", "--train.schedule", "wsd", "--train.decay_fraction", 0, "--train.max_steps", 4)
    assert stable == pytest.approx(1e-3)
    decayed = final_rate("wsd", "--train.schedule", "wsd", "--train.decay_fraction", 0.5, "--train.max_steps", 4)
    assert decayed == pytest.approx(1e-3 * 0.1)
    assert final_rate("cosine", "--train.max_steps", 4, "--train.final_learning_rate", 0.2) == pytest.approx(2e-4)


def test_logs_and_checkpoints_lie_where_they_are_looked_for(finished: Any) -> None:
    for role in ("student", "control"):
        assert len(logged(finished.run, "loss", role)) == STEPS // 4
        assert len(logged(finished.run, "held_out_kl", role)) == STEPS // 8 + 1  # one at the end
        events = list((finished.run / "logs" / role).glob("events.out.tfevents.*"))
        assert len(events) == 1 and events[0].stat().st_size > 0
        found = torch.load(finished.run / "checkpoints" / role / "best.ckpt", weights_only=True)
        assert "state_dict" in found and "optimizer_states" not in found
    last = checkpoint(finished.run)
    assert set(last) >= {"state_dict", "optimizer_states", "lr_schedulers", "global_step"}
    assert last["global_step"] == STEPS
    saved = load_file(finished.run / "student/model.safetensors")
    assert torch.equal(saved["lm_head.weight"], last["state_dict"]["student.model.lm_head.weight"])


def test_the_best_checkpoint_is_that_of_the_least_held_out_kl(finished: Any) -> None:
    measured = logged(finished.run, "held_out_kl")
    assert checkpoint(finished.run, "best.ckpt")["global_step"] == min(8 * (measured.index(min(measured)) + 1), STEPS)


def test_a_training_shorter_than_the_interval_is_measured_at_its_end(train: Any, tmp_path: Path) -> None:
    train("--train.validate_every_steps", 1000, "--train.max_steps", 3, "--train.log_every_steps", 1).done()
    assert len(logged(tmp_path / "run", "held_out_kl")) == 1
    assert checkpoint(tmp_path / "run", "best.ckpt")["global_step"] == 3


def test_without_held_out_text_there_is_the_last_checkpoint_alone(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", cache={"held_out_samples": 0}, train={"max_steps": 9})
    distill("cache-teacher", file).done()
    distill("train-student", file).done()
    assert [path.name for path in (tmp_path / "run/checkpoints/student").glob("*.ckpt")] == ["step-00000009.ckpt"]


def test_the_seed_makes_the_training_and_another_seed_another(train: Any, plain: Path, tmp_path: Path) -> None:
    train("--train.max_steps", 6, "--run_dir", tmp_path / "same").done()
    train("--train.max_steps", 6, "--run_dir", tmp_path / "other", "--train.seed", 1).done()
    same, other, one = (
        load_file(run / "student/model.safetensors") for run in (tmp_path / "same", tmp_path / "other", plain)
    )
    assert all(torch.equal(same[name], one[name]) for name in one)
    assert not torch.equal(other["lm_head.weight"], one["lm_head.weight"])


def test_the_control_is_the_student_that_learns_from_the_text_alone(train: Any, finished: Any, tmp_path: Path) -> None:
    train("--loss.alpha", 1).done()
    text_alone, control = (
        load_file(f / "model.safetensors") for f in (tmp_path / "run/student", finished.run / "control")
    )
    assert all(torch.equal(text_alone[name], control[name]) for name in control)


def test_half_precision_on_a_cpu_is_refused(train: Any) -> None:
    train("--train.precision", "16-mixed", "--train.accelerator", "cpu").refused("16-mixed", "CUDA", "bf16-mixed")


def test_without_a_cache_there_is_nothing_to_train_on(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    distill("train-student", file).refused(str(tmp_path / "run/cache"), "no cache here", "distill cache-teacher")


def test_an_unfinished_cache_is_refused(finished: Any, train: Any, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(finished.cache, tmp_path / "cache"))
    lines = (cache / "journal.jsonl").read_text().splitlines(keepends=True)
    (cache / "journal.jsonl").write_text("".join(lines[:-2]))
    train("--cache.dir", cache).refused("not finished", f"2 of {len(lines)} shards to go", "distill cache-teacher")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--cache.threshold", "0.05"], ["threshold", "0.05", "0.02"]),
        (["--cache.scheme", "top_k"], ["scheme", "top_k", "varopt"]),
        (["--cache.temperature", "2"], ["temperature", "2", "1"]),
        (["--corpus.sequence_length", "32"], ["sequence_length", "32", "48"]),
        (["--corpus.pack", "false"], ["pack", "False", "True"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_a_cache_of_other_settings_is_refused(train: Any, changed: list[str], words: list[str]) -> None:
    train(*changed).refused("cache", "made with other settings", *words)


def test_a_damaged_cache_is_refused_when_the_damage_is_met(finished: Any, train: Any, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(finished.cache, tmp_path / "cache"))
    shard = cache / "shards/train-000002.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    train("--cache.dir", cache).refused("train-000002.safetensors", "distill inspect", "--verify")
    assert not (tmp_path / "run/student").exists()


def test_a_student_of_an_earlier_cache_does_not_pass_for_one_of_this(
    train: Any, distill: Any, finished: Any, tmp_path: Path
) -> None:
    """Same settings of training, same folder, but the targets are others."""
    train("--train.max_steps", 1).done()
    other = ["--cache.dir", tmp_path / "other", "--cache.seed", 1]
    distill("cache-teacher", finished.file, *other).done()
    train("--train.max_steps", 1, *other).refused("was trained with other settings", "cache.seed: 0 there, 1 here")
