"""Every kind of student learns from a cache by the same commands, is saved whole, loads, and is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.models.huggingface import HuggingFaceLanguageModel
from distill.plugins import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
LORA = {"rank": 4, "base_dtype": "float32"}
GATED = '''
"""A student without attention: a gated linear recurrence (h = a * h + (1 - a) * v) in every block."""

import torch
from torch import nn

from distill.models.language_model import Head


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.gate, self.value, self.out = nn.RMSNorm(size), *(nn.Linear(size, size) for _ in range(3))

    def forward(self, hidden_BLD, begins_BL):
        normed_BLD = self.norm(hidden_BLD)
        keep_BLD = torch.sigmoid(self.gate(normed_BLD) + 1)
        new_BLD = (1 - keep_BLD) * self.value(normed_BLD)
        keep_BLD = keep_BLD.masked_fill(begins_BL[..., None], 0.0)  # a document begins with an empty state
        state_BD, states = torch.zeros_like(new_BLD[:, 0]), []
        for keep_BD, new_BD in zip(keep_BLD.unbind(1), new_BLD.unbind(1)):
            state_BD = keep_BD * state_BD + new_BD
            states.append(state_BD)
        return hidden_BLD + self.out(torch.stack(states, 1))


class GatedRecurrence(nn.Module):
    def __init__(self, vocab_size: int, size: int = 24, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(layers))
        self.output = nn.Linear(size, vocab_size)

    def body(self, input_ids_BL, position_ids_BL):
        hidden_BLD = self.embedding(input_ids_BL)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, position_ids_BL == 0)
        return hidden_BLD

    @property
    def head(self):
        return Head(self.output.weight, self.output.bias)
'''


def student(class_path: str, **options: Any) -> list[str]:
    return ["--student.class_path", class_path, "--student.options", json.dumps(options), "--evaluate.control", "false"]


@pytest.fixture(scope="module")
def base(world: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pretrained model, smaller than the teacher, for adapters to go on."""
    return str(world.save_teacher(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=2, seed=1))


@pytest.fixture(scope="module")
def unpacked(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a run on a cache of one document a sample."""
    folder = tmp_path_factory.mktemp("unpacked")
    file = world.write(folder / "experiment.yaml", corpus={"pack": False}, cache={"max_samples": 60})
    distill("cache-teacher", file).done()
    return [file, "--cache.dir", str(folder / "run/cache")]


def learns(distill: Any, run: Path, chosen: list[str]) -> Path:
    """Train and evaluate; the folder of the student, which is nearer to the teacher than it began."""
    chosen = [*chosen, "--run_dir", str(run)]
    distill("train-student", *chosen).done()
    distill("evaluate", *chosen).done()
    result = json.loads((run / "evaluation.json").read_text())
    assert 0 < result["fidelity"]["student"]["kl"] < 0.95 * result["fidelity"]["before"]["kl"]
    return run / "student"


def check_ordinary(folder: Path, model_type: str) -> None:
    """transformers alone opens the folder, and its model is the one that the pipeline measured."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == model_type and not (folder / "student.json").exists()
    ids_BL, positions_BL = torch.arange(20)[None], torch.arange(20)[None]
    ours = load_language_model(folder)
    assert type(ours) is HuggingFaceLanguageModel
    with torch.no_grad():
        found = ours.head(ours.body(ids_BL, positions_BL))
        torch.testing.assert_close(found, model(input_ids=ids_BL).logits, rtol=0, atol=1e-5)


def test_compact(finished: Any, distill: Any, tmp_path: Path) -> None:
    chosen = [*finished.elsewhere(tmp_path), *student("compact", hidden_size=16, layers=1, heads=2)]
    assert type(load_language_model(learns(distill, tmp_path, chosen))).__name__ == "CompactDecoder"


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 2, "depth": "importance", "calibration_samples": 4},
        {"hidden_size": 24, "intermediate_size": 40, "key_value_groups": 1, "calibration_samples": 4},
    ],
    ids=["depth", "width"],
)
def test_pruned_by_importance(finished: Any, distill: Any, tmp_path: Path, sizes: dict[str, Any]) -> None:
    chosen = [*finished.elsewhere(tmp_path), *student("pruned", **sizes)]
    check_ordinary(learns(distill, tmp_path, chosen), "llama")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora(finished: Any, distill: Any, base: str, tmp_path: Path, quantization: str) -> None:
    chosen = [*finished.elsewhere(tmp_path), *student("lora", model=base, quantization=quantization, **LORA)]
    folder = learns(distill, tmp_path, chosen)
    check_ordinary(folder, "llama")
    trained, given = load_file(folder / "model.safetensors"), load_file(Path(base) / "model.safetensors")
    assert trained.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(trained[name], tensor) is ("_proj" not in name), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lora_in_16_bits_with_recomputed_blocks(
    finished: Any, distill: Any, base: str, tmp_path: Path, precision: str
) -> None:
    chosen = [*finished.elsewhere(tmp_path), *student("lora", model=base, quantization="nf4", rank=4, dropout=0.1)]
    levers = ["--train.precision", precision, "--train.activation_checkpointing"]
    levers += ["--evaluate.student_dtype", "bfloat16"]
    check_ordinary(learns(distill, tmp_path, [*chosen, *levers]), "llama")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_goes_on_from_a_checkpoint_of_the_adapters_alone(
    finished: Any, distill: Any, base: str, tmp_path: Path, quantization: str
) -> None:
    run = tmp_path / "run"
    chosen = [*finished.elsewhere(run), *student("lora", model=base, quantization=quantization, dropout=0.1, **LORA)]
    chosen += ["--train.max_steps", "6", "--train.checkpoint_every_steps", "3"]
    distill("train-student", *chosen).done()
    whole = load_file(run / "student/model.safetensors")
    first, last = sorted((run / "checkpoints/student").glob("step-*.ckpt"))
    kept = torch.load(first, weights_only=True)["state_dict"]
    assert kept and all(".lora_" in name for name in kept)
    last.unlink()
    (run / "student").rename(tmp_path / "whole")
    distill("train-student", *chosen, "--resume").done()
    again = load_file(run / "student/model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_another_family_from_its_configuration(finished: Any, distill: Any, tmp_path: Path) -> None:
    chosen = [*finished.elsewhere(tmp_path), *student("huggingface", config=GPT2)]
    check_ordinary(learns(distill, tmp_path, chosen), "gpt2")


def test_mamba2(unpacked: list[str], distill: Any, mamba2: dict[str, Any], tmp_path: Path) -> None:
    chosen = [*unpacked, *student("huggingface", config=mamba2)]
    check_ordinary(learns(distill, tmp_path, chosen), "mamba2")


def test_a_gated_recurrence_of_ones_own(finished: Any, distill: Any, tmp_path: Path) -> None:
    """Packed, since it forgets where positions restart; and its blocks are found and recomputed."""
    (tmp_path / "gated.py").write_text(GATED)
    chosen = [*finished.elsewhere(tmp_path / "run"), *student(f"{tmp_path}/gated.py:GatedRecurrence", size=16)]
    folder = learns(distill, tmp_path / "run", [*chosen, "--train.activation_checkpointing"])
    assert (
        type(load_language_model(folder, class_path=f"{tmp_path}/gated.py:GatedRecurrence")).__name__
        == "GatedRecurrence"
    )
    leaky = GATED.replace("keep_BLD.masked_fill(begins_BL[..., None], 0.0)", "keep_BLD")
    (tmp_path / "leaky.py").write_text(leaky)
    chosen = [*finished.elsewhere(tmp_path / "other"), *student(f"{tmp_path}/leaky.py:GatedRecurrence")]
    assert "each is read in a row of its own" in distill("train-student", *chosen).done().out
