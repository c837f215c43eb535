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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paired import Row, Setup

BENCHES = (
    "head_loss",
    "train_step",
    "cache_throughput",
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
    parser.add_argument("--json", type=Path, help="file for machine and rows")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup = Setup(options.device, options.tiny, options.repeats)
    if options.here:
        measure_here(options.only[0], setup, options.here)
        return
    found: dict[str, Any] = {"machine": machine(setup.device), "command": " ".join(sys.argv[1:]), "rows": []}
    failed = []
    for name in options.only or (PEERS if options.peers else BENCHES):
        begin = time.perf_counter()
        rows = measure_apart(name, setup)
        if rows is None:
            failed.append(name)
            continue
        found["rows"] += [{**asdict(row), "met": row.met} for row in rows]
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    text = markdown(found["machine"], [Row(**{k: v for k, v in row.items() if k != "met"}) for row in found["rows"]])
    print(text)
    data = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    for path, content in ((options.json, data), (options.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    if failed:
        raise SystemExit(f"not measured, see above: {', '.join(failed)}")


def measure_apart(name: str, setup: Setup) -> list[Row] | None:
    """Return the rows of a benchmark, run in a process of its own; None when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        line = [sys.executable, __file__, "--only", name, "--here", str(file), "--device", setup.device]
        line += ["--repeats", str(setup.repeats), *(["--tiny"] if setup.tiny else [])]
        if subprocess.run(line, stdout=sys.stderr).returncode:
            return None
        return [Row(**json.loads(row)) for row in file.read_text(encoding="utf-8").splitlines()]


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
        met = {True: "yes", False: "no", None: ""}[row.met]
        processor = "" if row.processor is None else f"{row.processor:.2f}"
        between = "" if row.low == row.high else f"{row.low:.2f} – {row.high:.2f}"
        yield (
            f"| {row.bench} | {row.case} | {row.measure} | {row.ours} | {row.peer} | {row.ratio:.2f} | {between} "
            f"| {processor} | {row.aim} | {met} |"
        )


if __name__ == "__main__":
    main()
