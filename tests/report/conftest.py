"""Run folders as experiments leave them: every section of evaluation.json, logs of two starts, costs, a forecast."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FakeRun = Callable[..., Path]
MODELS = ("teacher", "before", "student", "control")
KL = {"before": 12.939761200079731, "student": 3.174464592512916, "control": 3.4630360691862947}
NLL = {
    "teacher": 3.7841920873095805,
    "before": 16.317578387538006,
    "student": 6.7437090909364175,
    "control": 6.90821443568,
}


def fidelity(model: str, shift: float) -> dict[str, Any]:
    nll = NLL[model] + shift
    result: dict[str, Any] = {
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll * 4080 / 18320 / math.log(2),
    }
    result |= {
        "ece": 0.0585860271 if model == "teacher" else 0.0161464503,
        "confidence_gap": -0.0123456 + 0.01 * len(model),
    }
    kl = None
    if model != "teacher":
        kl = KL[model] + shift
        agreement = 0.42 * math.exp(-kl / 3)
        result |= {
            "kl": kl,
            "reverse_kl": 1.3 * kl,
            "jsd": 0.69 * (1 - math.exp(-kl / 2)),
            "acceptance": 1.3 * agreement,
        }
        result |= {"top1_agreement": agreement, "top5_agreement": 1.7 * agreement}
    result["intervals"] = {key: [value * 0.983, value * 1.0171] for key, value in result.items() if key != "ece"}
    for key, edges in (("by_entropy", (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)), ("by_position", (0, 4, 16, 64))):
        ends: list[float | None] = [*edges[1:], None if key == "by_entropy" else 256]
        result[key] = [
            one_bin(start, end, index, nll, kl) for index, (start, end) in enumerate(zip(edges, ends, strict=True))
        ]
    return result


def one_bin(start: float, end: float | None, index: int, nll: float, kl: float | None) -> dict[str, Any]:
    found = {"from": start, "to": end, "positions": 400 + 173 * index % 611, "nll": nll * (0.5 + 0.15 * index)}
    if kl is not None:
        agreement = 1.9 / (1 + index) / kl
        found |= {"kl": kl * (1.4 - 0.1 * index), "top1_agreement": agreement, "acceptance": 1.1 * agreement}
    return found


def task(value: float, chance: float | None, documents: int = 200) -> dict[str, Any]:
    error = math.sqrt(max(0.0, value * (1 - value)) / documents)
    result = {"documents": documents, "metric": "acc_norm", "metrics": {"acc_norm": {"value": value, "stderr": error}}}
    result["metrics"]["acc"] = {"value": value * 0.93, "stderr": error * 0.97}
    return result if chance is None else {**result, "chance": chance}


def evaluation(shift: float = 0.0) -> dict[str, Any]:
    """All of the contract; `shift` moves every distance of the students."""
    scores = {
        "arc_easy": (0.58, 0.39, 0.31, 0.25),
        "hellaswag": (0.43, 0.33, 0.29, 0.25),
        "piqa": (0.68, 0.59, 0.55, 0.5),
    }
    scores |= {"lambada_openai": (0.42, 0.11, 0.04, 0.0), "winogrande": (0.53, 0.512, 0.507, 0.5)}
    benchmarks = {
        model: {name: task(values[index] - (shift / 20 if index else 0), values[3]) for name, values in scores.items()}
        for index, model in enumerate(("teacher", "student", "control"))
    }
    for index, model in enumerate(("teacher", "student", "control")):
        metrics = {"word_perplexity": {"value": 31.4 + 20.7 * index}}
        benchmarks[model]["wikitext"] = {"documents": 62, "metric": "word_perplexity", "metrics": metrics}
    cost = {}
    for model, factor in (("teacher", 1.0), ("student", 2.13), ("control", 2.11)):
        cost[model] = {"bytes_on_disk": int(144_811_000 * (1 if model == "teacher" else 1.567)), "kv_cache": True}
        cost[model] |= {"weight_bytes": int(182_300_000 / factor), "peak_bytes": int(402_300_000 / factor)}
        cost[model] |= {"prompt_tokens": 128, "new_tokens": 32}
        cost[model]["prefill"] = {"1": 1203.4 * factor, "8": 1611.9 * factor}
        cost[model]["decode"] = {"1": 23.61 * factor, "8": 121.04 * factor}
        cost[model]["rounds"] = {
            phase: {size: [rate * 0.97, rate, rate * 1.05] for size, rate in cost[model][phase].items()}
            for phase in ("prefill", "decode")
        }
    return {
        "parameters": {"teacher": 134_515_008, "before": 56_632_896, "student": 56_632_896, "control": 56_632_896},
        "text": {"tokens": 4080, "samples": 16, "bytes": 18320, "documents": 12, "resampled_documents": 12}
        | {"dropped_mass": 0.0123, "left_out_samples": 2},
        "fidelity": {model: fidelity(model, 0.0 if model in ("teacher", "before") else shift) for model in MODELS},
        "student_against_control": {
            "kl": {"difference": -0.288571, "interval": [-0.3123, -0.2671], "p": 0.0002},
            "nll": {"difference": -0.164505, "interval": [-0.2011, -0.1234], "p": 0.0004},
            "top1_agreement": {"difference": 0.0223, "interval": [0.0101, 0.0345], "p": 0.0012},
            "acceptance": {"difference": 0.0024, "interval": [-0.0051, 0.0099], "p": 0.53},
        },
        "benchmarks": benchmarks,
        "cost": cost,
        "speculative": {"draft_tokens": 4, "speedup": 1.23},
        "texts": {
            "prompts": [
                "Fellow citizens of the Senate and of the House of Representatives:",
                "The state of our <union>",
            ],
            "truth": [" In meeting you again I feel much satisfaction.", " is strong, and our people are at peace."],
            "teacher": [
                "\n\nI am pleased to inform you that the report\nof the committee is before you.",
                " is a matter of record.",
            ],
            "student": [
                " the the of the public service of the United States, and of the",
                "<script>alert('it ran')</script> & more",
            ],
            "control": [" and the and the and the and the and the and the and the and the", " the " * 12],
        },
        "seeds": {
            "student": {"kl": spread([3.174, 3.181, 3.169]), "top1_agreement": spread([0.1397, 0.1411, 0.1385])},
            "control": {"kl": spread([3.463, 3.470, 3.459]), "top1_agreement": spread([0.1174, 0.1168, 0.1181])},
        },
        "experiment": {
            "corpus": {"path": "data/sotu.jsonl", "name": None, "sequence_length": 256, "held_out": 0.1},
            "teacher": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "quantization": "nf4"},
            "cache": {"scheme": "varopt", "threshold": 0.02},
            "student": {"class_path": "pruned", "options": {"layers": 8}},
            "loss": {"alpha": 0.0},
            "train": {"epochs": 1, "learning_rate": 0.001, "loggers": ["tensorboard", "csv"]},
            "run_dir": "runs/demo",
        },
        "versions": {"distill": "0.1", "python": "3.11.2", "torch": "2.13.0"},
        "machine": {
            "system": "Linux",
            "processor": "a processor",
            "cores": 2,
            "memory_bytes": 8_200_000_000,
            "device": "cpu",
        },
        "fingerprints": {
            name: f"{name:_<12}".encode().hex() * 2 for name in ("teacher_weights", "tokenizer", "corpus")
        },
    }


def spread(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {"mean": mean, "deviation": math.sqrt(sum((v - mean) ** 2 for v in values) / 2), "values": values}


COSTS = (
    {"phase": "cache-teacher", "seconds": 81.2, "ended": "done", "peak_memory_bytes": 1_310_000_000},
    {"phase": "train-student", "seconds": 40.1, "ended": "interrupted", "peak_memory_bytes": 1_650_000_000},
    {"phase": "train-student", "seconds": 222.4, "ended": "done", "peak_memory_bytes": 1_710_000_000, "joules": 8123.0}
    | {"energy_source": "rapl"},
    {"phase": "evaluate", "seconds": 52.5, "ended": "done", "peak_memory_bytes": 1_220_000_000},
)
FORECAST = {
    "rows": [
        {"what": "peak memory of training", "unit": "bytes", "forecast": 1_650_000_000, "measured": 1_710_000_000},
        {"what": "time of training", "unit": "s", "forecast": 201.0, "measured": 222.4},
        {"what": "size of the cache", "unit": "bytes", "forecast": 812_345},
    ]
}


def log_lines(role: str, steps: range, shift: float) -> list[str]:
    """A log as Lightning's CSVLogger writes it: the loss every 4 steps, the held-out KL every 20."""
    lines = ["epoch,gradient_norm,held_out_kl,held_out_loss,learning_rate,loss,step"]
    floor, start = (3.1, 7.5) if role == "student" else (6.5, 11.5)
    for step in steps:
        if step % 4 == 3:
            noise = 0.15 * math.sin(step * 1.7) * math.cos(step * 0.37)
            lines.append(f"0,2.5,,,0.001,{floor + shift + start * math.exp(-step / 25) + noise},{step}")
        if step and step % 20 == 0:
            kl = KL[role] + shift + 4 * math.exp(-step / 40)
            lines.append(f",,{kl},{kl},,,{step}")
    return lines


@pytest.fixture(scope="session")
def full_evaluation() -> Callable[..., dict[str, Any]]:
    return evaluation


@pytest.fixture
def fake_run(tmp_path: Path) -> FakeRun:
    """Write a run folder; `change` mends its evaluation, `shift` moves its figures, None leaves a file out."""

    def write(
        name: str = "demo",
        change: Callable[[dict[str, Any]], object] | None = None,
        shift: float = 0.0,
        **parts: Any,
    ) -> Path:
        return write_run(tmp_path / name, change, shift, **parts)

    return write


def write_run(
    run: Path,
    change: Callable[[dict[str, Any]], object] | None = None,
    shift: float = 0.0,
    logs: bool = True,
    costs: tuple[dict[str, Any], ...] | None = COSTS,
    forecast: dict[str, Any] | None = FORECAST,
) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    content = copy.deepcopy(evaluation(shift))
    if change:
        change(content)
    (run / "evaluation.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    for role in ("student", "control") if logs else ():
        folder = run / "logs" / role
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.1.csv").write_text("\n".join(log_lines(role, range(0, 150), shift)) + "\n")
        (folder / "metrics.csv").write_text("\n".join(log_lines(role, range(140, 301), shift)) + "\n")
    if costs is not None:
        (run / "costs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in costs))
    if forecast is not None:
        (run / "forecast.json").write_text(json.dumps(forecast))
    return run
