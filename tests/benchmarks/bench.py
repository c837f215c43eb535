"""All measurements of speed and size in one table, each a ratio measured side by side: `make bench`.

    python tests/benchmarks/bench.py --only head_loss --json build/bench.json --markdown build/bench.md

Each benchmark is a file here with a function `rows(setup)` that yields `paired.Row`s; it runs in a process of its own.
A CUDA device measures the twins of the same rows: `--device cuda`. `--tiny` takes the sizes of a test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paired import Row, Setup

BENCHES = (
    "head_loss",
    "train_step",
    "memory_levers",
    "compiled_body",
    "cache_throughput",
    "generate",
    "cache_size",
    "decode",
    "corpus",
    "end_to_end",
    "startup",
    "scaling",
)
"""Benchmarks in the order of the table; each is a file of this name with a function `rows`."""
PEERS = ("peer_losses", "peer_trl")
"""Benchmarks that need the peers' libraries: `make bench-peers`."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "bf16")
"""Flags of a processor that decide how fast its matrix products are."""


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=(*BENCHES, *PEERS), metavar="NAME", help="one or several")
    parser.add_argument("--peers", action="store_true", help="those that need the peers' libraries")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="the sizes of a test: the figures mean nothing")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of each row")
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as bf16")
    parser.add_argument("--json", type=Path, help="file for machine and rows")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup = Setup(options.device, options.tiny, options.repeats, options.case)
    if options.here:
        measure_here(options.only[0], setup, options.here)
        return
    rows: list[Row] = []
    failed = []
    for name in options.only or (PEERS if options.peers else BENCHES):
        begin = time.perf_counter()
        found = measure_apart(name, setup)
        rows += found.rows
        failed += [f"{name}: {found.failure}"] if found.failure else []
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print(markdown(machine(setup.device), rows))
    write(rows, setup, options.json, options.markdown)
    if failed:
        raise SystemExit("not measured, see above: " + "; ".join(failed))


@dataclass(frozen=True)
class Found:
    """The rows of a benchmark, and the reason if there are not all of them."""

    rows: list[Row]
    failure: str = ""


def write(rows: list[Row], setup: Setup, data: Path | None, table: Path | None) -> None:
    """Write machine and rows as JSON and as a Markdown table."""
    where = machine(setup.device)
    content = {"machine": where, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    texts = {data: json.dumps(content, indent=1, ensure_ascii=False) + "\n", table: markdown(where, rows)}
    for path, text in texts.items():
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def measure_apart(name: str, setup: Setup, limit: float | None = None) -> Found:
    """Measure a benchmark in a process of its own, in `limit` seconds; rows that came before a failure count."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        line = [sys.executable, __file__, "--only", name, "--here", str(file), "--device", setup.device]
        line += ["--case", setup.case, "--repeats", str(setup.repeats), *(["--tiny"] if setup.tiny else [])]
        try:
            status = subprocess.run(line, stdout=sys.stderr, timeout=limit).returncode
            failure = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            failure = "no time was left"
        rows = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return Found([Row(**json.loads(row)) for row in rows], failure)


def measure_here(name: str, setup: Setup, file: Path) -> None:
    """Write the rows of a benchmark as lines of JSON."""
    warnings.filterwarnings("ignore")
    with file.open("w", encoding="utf-8") as lines:
        for row in importlib.import_module(name).rows(setup):
            print(json.dumps(asdict(row)), file=lines, flush=True)


def machine(device: str) -> dict[str, Any]:
    """Return the machine that was measured: processor or card, cores, threads, versions."""
    import torch

    from distill.system.machine import machine as describe
    from distill.system.machine import versions

    known = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    flags = [flag for flag in FLAGS if flag in known]
    found = versions()
    return {**describe(torch.device(device)), "flags": flags, "torch": found["torch"], "python": found["python"]}


def markdown(where: dict[str, Any], rows: Iterable[Row]) -> str:
    """Return the table, with the machine above it."""
    return "\n".join(_lines(where, rows)) + "\n"


def _lines(where: dict[str, Any], rows: Iterable[Row]) -> Iterator[str]:
    yield (
        f"{where['processor']}, {where['cores']} cores ({', '.join(where['flags'])}), {where['threads']} threads, "
        f"{where['memory_bytes'] / 1e9:.0f} GB; {where['device']}; torch {where['torch']}, Python {where['python']}"
    )
    yield ""
    yield "| row | case | compared | ours | peer | ratio | of the pairs | processor time | aim | met |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---|---|"
    for row in rows:
        if row.ratio is None:
            yield f"| {row.bench} | {row.case} | {row.measure} | | {row.peer} | | | | | |"
            continue
        met = {True: "yes", False: "no", None: ""}[row.met]
        processor = "" if row.processor is None else _number(row.processor)
        between = "" if row.low == row.high else f"{_number(row.low)} – {_number(row.high)}"
        yield (
            f"| {row.bench} | {row.case} | {row.measure} | {row.ours} | {row.peer} | {_number(row.ratio)} | {between} "
            f"| {processor} | {row.aim} | {met} |"
        )


def _number(ratio: float) -> str:
    """Return a ratio with two decimals, with three digits where it is small, with none where it is large."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3g}"


if __name__ == "__main__":
    main()
