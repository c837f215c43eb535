"""Students of pure distillation, of a mixture and of the text alone, from three kinds of sparse target, side by side.

    python tests/benchmarks/compare_targets.py CORPUS --work FOLDER --tokens 160000

CORPUS is what `corpus.path` takes. Every step is a command of the product in a process of its own: three caches
(varopt, top_k, random), seven trainings of the same student (from each cache one with alpha 0 and one with `--alpha`; a
control with alpha 1), seven evaluations beside the live teacher on the same held-out samples. Everything lies in
FOLDER; the same command goes on where it was stopped. Prints a markdown table and writes FOLDER/comparison.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

SCHEMES = {
    "varopt τ = 1/50": ["--cache.scheme", "varopt", "--cache.threshold", "0.02"],
    "top-k 16": ["--cache.scheme", "top_k", "--cache.entries", "16"],
    "random N = 50": ["--cache.scheme", "random", "--cache.entries", "50"],
}
METRICS = {"kl": "KL", "nll": "nll", "top1_agreement": "top-1 agreement", "acceptance": "acceptance", "ece": "ECE"}
SHARES = ("top1_agreement", "acceptance", "ece")


@dataclass(frozen=True)
class Row:
    """One training: the scheme of its cache and its alpha."""

    name: str
    scheme: str
    alpha: float

    @property
    def folder(self) -> str:
        return slug(self.name)


def main() -> None:
    options = read_options()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_experiment(work, experiment(options, work))
    rows = [Row("control", next(iter(SCHEMES)), 1.0)]
    for scheme in SCHEMES:
        rows += [Row(f"{scheme}, pure", scheme, 0.0), Row(f"{scheme}, mixed", scheme, options.alpha)]
    started = time.monotonic()
    run_all(work, rows, options.jobs)
    result = comparison(work, rows, options)
    result["seconds"] = round(time.monotonic() - started)
    (work / "comparison.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_report(result)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="a file, a folder or the name of a data set")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all that is made; continued if it is there"
    )
    parser.add_argument("--tokens", type=int, default=160_000, help="tokens of the training samples")
    parser.add_argument("--alpha", type=float, default=0.3, help="weight of the true token in mixed rows")
    parser.add_argument("--student", default="pruned", help="student.class_path")
    parser.add_argument("--student-options", type=json.loads, default={"layers": 3}, help="student.options as JSON")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="samples an optimiser step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--quantization", default="nf4", help="teacher.quantization: nf4, int8 or none")
    parser.add_argument("--held-out", type=int, default=48, help="held-out samples to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time, of one thread each")
    return parser.parse_args()


def experiment(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    corpus = Path(options.corpus)
    return {
        "corpus": {
            "path": str(corpus.resolve()) if corpus.exists() else options.corpus,
            "sequence_length": options.sequence_length,
        },
        "teacher": {"model": "smollm2-135m-demo", "quantization": options.quantization},
        "cache": {
            "max_samples": math.ceil(options.tokens / options.sequence_length),
            "held_out_samples": 8,
            "shard_samples": 16,
        },
        "student": {"class_path": options.student, "options": options.student_options},
        "train": {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "precision": "32-true",
            "seed": options.seed,
            "validate_every_steps": 1_000_000,  # once, at the end
            "checkpoint_every_steps": 50,
            "keep_checkpoints": 1,
        },
        "evaluate": {"max_samples": options.held_out},
        "run_dir": str(work / "runs"),
    }


def write_experiment(work: Path, content: dict[str, Any]) -> None:
    """The experiment file; what is in the folder must have been made from the same one."""
    file = work / "experiment.yaml"
    if file.exists() and yaml.safe_load(file.read_text(encoding="utf-8")) != content:
        sys.exit(f"{file} has other settings: give those, or another --work")
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def run_all(work: Path, rows: list[Row], jobs: int) -> None:
    """All steps; each waits for those it needs, which stand before it in the queue, so that somebody makes them."""
    with ThreadPoolExecutor(jobs) as pool:

        def then(needed: Future[None] | None, *step: Any) -> Future[None]:
            def work_on() -> None:
                if needed is not None:
                    needed.result()
                run_step(work, *step)

            return pool.submit(work_on)

        caches = {scheme: then(None, "cache-teacher", slug(scheme), cache_options(work, scheme)) for scheme in SCHEMES}
        trained = [then(caches[row.scheme], "train-student", row.folder, row_options(work, row)) for row in rows]
        measured = [
            then(done, "evaluate", row.folder, row_options(work, row)) for row, done in zip(rows, trained, strict=True)
        ]
        try:
            for step in measured:
                step.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cache_options(work: Path, scheme: str) -> list[str]:
    return [*SCHEMES[scheme], "--cache.dir", str(work / "caches" / slug(scheme))]


def row_options(work: Path, row: Row) -> list[str]:
    own = ["--loss.alpha", f"{row.alpha:g}", "--run_dir", str(work / "runs" / row.folder)]
    return [*cache_options(work, row.scheme), *own]


def run_step(work: Path, command: str, name: str, options: list[str]) -> None:
    """One command, unless it was done before; its words go to `logs`, its seconds to `done`."""
    step = f"{command}-{name}"
    log, done = work / "logs" / f"{step}.txt", work / "done" / f"{step}.json"
    if done.exists():
        print(f"{step}: done before", flush=True)
        return
    for file in (log, done):
        file.parent.mkdir(exist_ok=True)
    if command == "train-student":
        options = [*options, "--resume"]
    line = [sys.executable, "-m", "distill", command, str(work / "experiment.yaml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as words:
        status = subprocess.run(line, stdout=words, stderr=subprocess.STDOUT, env=environment, cwd=work).returncode
    if status:
        raise SystemExit(f"{step}: exit status {status}, see {log}")
    seconds = round(time.monotonic() - started, 1)
    done.write_text(json.dumps({"seconds": seconds}) + "\n", encoding="utf-8")
    print(f"{step}: {seconds:,.0f} s", flush=True)


def comparison(work: Path, rows: list[Row], options: argparse.Namespace) -> dict[str, Any]:
    """Return the evaluations' results beside their costs."""
    evaluations = {row.name: read(work / "runs" / row.folder / "evaluation.json") for row in rows}
    any_one = evaluations[rows[0].name]
    for name in ("teacher", "before"):
        assert all(found["fidelity"][name] == any_one["fidelity"][name] for found in evaluations.values())
    return {
        "options": {**vars(options), "work": None, "corpus": Path(options.corpus).name},
        "positions": any_one["text"]["tokens"],
        "parameters": any_one["parameters"],
        "caches": {scheme: cache_facts(work, scheme) for scheme in SCHEMES},
        "rows": {
            "teacher": any_one["fidelity"]["teacher"],
            "before": any_one["fidelity"]["before"],
            **{
                row.name: {
                    **evaluations[row.name]["fidelity"]["student"],
                    "alpha": row.alpha,
                    **training_facts(work, row),
                }
                for row in rows
            },
        },
    }


def cache_facts(work: Path, scheme: str) -> dict[str, Any]:
    from distill.cache.format.folder import read_journal, read_manifest

    folder = work / "caches" / slug(scheme)
    manifest, entries = read_manifest(folder), read_journal(folder).values()
    positions = sum(entry.positions for entry in entries)
    return {
        "train_tokens": manifest.splits["train"] * manifest.sequence_length,
        "bytes_a_position": sum(entry.bytes for entry in entries) / positions,
        "entries_a_position": sum(entry.entries for entry in entries) / positions,
        "seconds": read(work / "done" / f"cache-teacher-{slug(scheme)}.json")["seconds"],
    }


def training_facts(work: Path, row: Row) -> dict[str, Any]:
    """Steps, and the seconds of one: those of the last start, saving included, by the steps that it made."""
    steps = max(int(path.stem[5:]) for path in (work / "runs" / row.folder / "checkpoints/student").glob("step-*.ckpt"))
    words = (work / "logs" / f"train-student-{row.folder}.txt").read_text(encoding="utf-8")
    # Nothing is said where a training was finished by one start and noticed as finished by another.
    seconds = re.findall(r"after ([\d,]+) s$", words, flags=re.MULTILINE)
    resumed = re.findall(r"continuing from .*step-(\d+)\.ckpt", words)
    made = steps - (int(resumed[-1]) if resumed else 0)
    return {
        "steps": steps,
        "seconds_a_step": float(seconds[-1].replace(",", "")) / made if seconds and made else None,
    }


def print_report(result: dict[str, Any]) -> None:
    options, rows = result["options"], result["rows"]
    tokens = next(iter(result["caches"].values()))["train_tokens"]
    size = result["parameters"]["student"] / 1e6
    print(
        f"\n{tokens:,} tokens of {options['corpus']}, {options['epochs']} epoch(s), {rows['control']['steps']:,} steps "
        f"of {options['batch_size']} x {options['sequence_length']} tokens; student {options['student']} "
        f"{json.dumps(options['student_options'])}, {size:.1f} M parameters; "
        f"{result['positions']:,} held-out positions; alpha of mixed {options['alpha']:g}; "
        f"{options['jobs']} processes of one thread\n"
    )
    print("| targets | " + " | ".join(METRICS.values()) + " | s/step |")
    print("|---|" + "---:|" * (len(METRICS) + 1))
    for name, row in rows.items():
        values = [shown(row, metric) for metric in METRICS]
        pace = row.get("seconds_a_step")
        print(f"| {name} | " + " | ".join(values) + f" | {'' if pace is None else f'{pace:.2f}'} |")
    print()
    for scheme, cache in result["caches"].items():
        print(
            f"cache {scheme}: {cache['bytes_a_position']:.1f} bytes and {cache['entries_a_position']:.1f} entries a "
            f"position, {cache['seconds']:,.0f} s"
        )


def shown(row: dict[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    form: Callable[[float], str] = "{:.2%}".format if metric in SHARES else "{:.4f}".format
    return form(row[metric])


def slug(name: str) -> str:
    """`varopt τ = 1/50, pure` as a file's name: `varopt-1-50-pure`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
