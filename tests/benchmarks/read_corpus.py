"""Reading of a large corpus: time to the first sample, tokens a second, largest memory, and the cost of going on.

    python tests/benchmarks/read_corpus.py [--gigabytes 2] [--documents 1000000] [--long 30] [--most N] [--cores 2]

Makes documents of the demo's speeches with one long one (in MB), the first that is read, in 16 jsonl files, in a folder
that goes. Reads them in processes of their own, each on `--cores` cores: once to the end (or to `--most` samples),
killed half-way, and again from there. Pages of tables that are mapped from disk are given back when memory is short, so
they are counted apart (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

READ = """
import resource, sys, threading, time
from distill.corpus import open_corpus
from distill.models import checkpoints, tokenizers
anonymous = 0
def watch():
    global anonymous
    while True:
        with open("/proc/self/status") as status:
            now = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
        anonymous = max(anonymous, now)
        time.sleep(0.1)
threading.Thread(target=watch, daemon=True).start()
tokenizer = tokenizers.load_tokenizer(checkpoints.resolve("smollm2-135m-demo"))
ready, started = time.monotonic(), time.process_time()
path, first, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
sets = open_corpus(path, tokenizer, sequence_length=1024, most=first, most_held_out=64, is_streamed=True)
sets.train[0]
seen, processor = time.monotonic(), time.process_time()
print(f"first sample after {seen - ready:.1f} s, {processor - started:.1f} s of processor time", flush=True)
sets = open_corpus(path, tokenizer, sequence_length=1024, most=most, is_streamed=True)
with sets.ahead():
    sets.train[len(sets.train) - 1]
spent = time.process_time() - processor
counts = sum(len(sets_.train) for sets_ in sets.gatherer.windows) * 1024
print(f"{counts:,} tokens in {time.monotonic() - seen:.0f} s, {spent:.0f} s of processor time")
print(f"{counts / max(spent, 1e-9):,.0f} tokens a processor second, {len(sets.gatherer.windows)} windows")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"largest memory {anonymous / 2**20:.2f} GiB, {peak / 2**20:.2f} GiB with the tables' pages", flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--long", type=float, default=30.0)
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # children have it too
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        make(corpus, options.gigabytes, options.documents, options.long)
        environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(folder, "tables"))}
        command = [sys.executable, "-c", READ, str(corpus), "64", str(options.most)]
        began = time.monotonic()
        subprocess.run(command, env=environment, check=True)
        whole = time.monotonic() - began
        environment["HF_DATASETS_CACHE"] = str(Path(folder, "again"))
        stopped = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(whole / 2)
        stopped.send_signal(signal.SIGKILL)
        stopped.wait()
        began = time.monotonic()
        print(f"killed after {whole / 2:.0f} s; going on:")
        subprocess.run(command, env=environment, check=True)
        print(f"whole {whole:.0f} s, half and the rest {whole / 2 + time.monotonic() - began:.0f} s")


def make(folder: Path, gigabytes: float, documents: int, long: float) -> None:
    """Write the corpus."""
    folder.mkdir()
    choose = random.Random(0)
    with open(Path(__file__).parents[2] / "data" / "sotu.jsonl", encoding="utf-8") as speeches:
        text = " ".join(json.loads(line)["text"] for line in speeches)
    each = int(gigabytes * 1e9 / documents)
    first = int(np.random.default_rng(0).permutation(16)[0])  # as `streams` orders them
    for number in range(16):
        with open(folder / f"{number:02d}.jsonl", "w", encoding="utf-8") as file:
            if number == first:
                file.write(json.dumps({"text": (text * 40)[: int(long * 1e6)]}) + "\n")
            for document in range(documents // 16):
                at = choose.randrange(len(text) - each)
                file.write(json.dumps({"text": f"{number} {document} {text[at : at + each]}"}) + "\n")


if __name__ == "__main__":
    main()
