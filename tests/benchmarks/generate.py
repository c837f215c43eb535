"""Texts that a model writes beside transformers' own `generate` and llama.cpp's server: `bench.py --only generate`.

Both write as many tokens for the same prompts, in batches of one size, with the same model and type, by sampling at
temperature 1. Ours is the whole author: it sorts the prompts by length, takes finished texts out of the batch and draws
by its own random numbers. The peer pads each batch on the left and runs it to the end of its longest text, as
`generate` does. In `own ends` texts end where the model ends them; in `all to the limit` no token ends a text. Each
side's speed is in tokens that it wrote, ends and texts of the other side left out. llama.cpp's server (xllamacpp, in a
process of its own) writes from the teacher's GGUF file in the file's own bits, by `generate.server`'s author.

    python tests/benchmarks/bench.py --only generate --repeats 3

`PROMPTS=questions.jsonl` takes the prompts of a file instead of the demo's corpus.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from paired import Row, Setup, cost, not_measured, ratio_row

from distill.corpus.shapes import Columns
from distill.corpus.sources import TextSource
from distill.generation.authors import Asked, LocalAuthor
from distill.generation.prompts import Asking, read_prompts
from distill.generation.sampling import Sampling
from distill.generation.server import ServerAuthor
from distill.models import checkpoints, tokenizers
from distill.models.generation import end_of_turn, ending_tokens
from teachers.huggingface import load_teacher

TEACHER = "smollm2-135m-demo"
CORPUS = os.environ.get("PROMPTS") or str(Path(__file__).resolve().parents[2] / "data" / "sotu.jsonl")
PROMPTS_VARIABLE = 24
"""Longest difference between the prompts' lengths."""


@dataclass(frozen=True)
class Case:
    """Type, prompts, texts at one time, and tokens a text at most."""

    dtype: str
    prompts: int
    batch_size: int
    new_tokens: int
    ends: bool

    def __str__(self) -> str:
        dtype = {"bfloat16": "bf16", "float32": "fp32"}[self.dtype]
        how = "own ends" if self.ends else "all to the limit"
        return f"{dtype}, {self.prompts} prompts, {self.batch_size} x {self.new_tokens}, {how}"


CASES = [Case(dtype, 32, 16, 64, ends) for dtype in ("bfloat16", "float32") for ends in (False, True)]
SERVED = Case("float32", 32, 16, 64, True)
"""Case that llama.cpp's server writes too."""
SERVER = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[4])
parameters.n_gpu_layers, parameters.verbosity = 0, -1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(86_400)
"""
TINY = [Case("float32", 2, 2, 4, False)]


class Bench:
    """A teacher, prompts of several lengths, and both ways to continue them."""

    def __init__(self, case: Case, device: str) -> None:
        checkpoint = checkpoints.resolve(TEACHER)
        self.file = checkpoint.folder / str(checkpoint.gguf_file)
        self.tokenizer = tokenizers.load_tokenizer(checkpoint)
        self.case, self.device = case, device
        self.teacher: Any = load_teacher(TEACHER, "none", case.dtype, device)  # type: ignore[arg-type]
        found = read_prompts(
            [TextSource(CORPUS, columns=Columns(prompts=True))],
            self.tokenizer,
            Asking(prompt_tokens=64),
            most=case.prompts,
        )
        self.prompts = [
            prompt.ids_L.tolist()
            if prompt.is_conversation
            else prompt.ids_L[: len(prompt.ids_L) - (7 * number) % PROMPTS_VARIABLE].tolist()
            for number, prompt in enumerate(found.prompts)
        ]
        assert len(self.prompts) >= case.prompts // 2, "the corpus has too few documents"
        while len(self.prompts) < case.prompts:
            self.prompts.append(self.prompts[len(self.prompts) // 2][5:])
        self.stop_ids = ending_tokens(self.teacher, self.tokenizer) if case.ends else frozenset()
        self.author = LocalAuthor(
            self.teacher,
            vocab_size=tokenizers.vocab_size(self.tokenizer),
            stop_ids=self.stop_ids,
            sampling=Sampling(),
            max_new_tokens=case.new_tokens,
            batch_size=case.batch_size,
        )
        self.written = 0

    def ours(self) -> None:
        asked = [Asked(ids, number, 0) for number, ids in enumerate(self.prompts)]
        self.written = sum(len(answer.ids) for answer in self.author.write(asked, lambda answer: None))

    def served(self, repeats: int) -> list[float]:
        """Return the tokens a second of processor time that llama.cpp's server writes, each time anew."""
        longest, threads = max(map(len, self.prompts)) + self.case.new_tokens + 8, torch.get_num_threads()
        slots = self.case.batch_size
        line = [sys.executable, "-c", SERVER, str(self.file), str(longest * slots), str(slots), str(threads)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            address, server = process.stdout.readline().strip(), psutil.Process(process.pid)
            author = ServerAuthor(
                f"{address}/v1",
                None,
                tokenizer=self.tokenizer,
                end_ids=(end_of_turn(self.tokenizer), self.tokenizer.eos_token_id),
                sampling=Sampling(),
                max_new_tokens=self.case.new_tokens,
                batch_size=slots,
            )
            found = []
            for repeat in range(repeats + 1):
                begin = sum(server.cpu_times()[:2]) + time.process_time()
                # Other prompts' numbers each time, or the server would find them in its cache of prompts.
                asked = [Asked(ids, number, repeat) for number, ids in enumerate(self.prompts)]
                written = sum(len(answer.ids) for answer in author.write(asked, lambda answer: None))
                found.append(written / (sum(server.cpu_times()[:2]) + time.process_time() - begin))
            process.kill()
        return found[1:]

    @torch.no_grad()
    def peer(self) -> None:
        self.written = 0
        torch.manual_seed(0)
        ends = sorted(self.stop_ids) or None
        for start in range(0, len(self.prompts), self.case.batch_size):
            few = self.prompts[start : start + self.case.batch_size]
            longest = max(map(len, few))
            ids_BL = torch.tensor([[0] * (longest - len(ids)) + ids for ids in few], device=self.device)
            mask_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in few], device=self.device)
            new_BL = self.teacher.model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=self.case.new_tokens,
                eos_token_id=ends,
                pad_token_id=0,
            )[:, longest:]
            self.written += sum(_length(row, self.stop_ids) for row in new_BL.tolist())


def _length(ids: Sequence[int], stop_ids: frozenset[int]) -> int:
    """Return the tokens of a text up to the first one that ends it."""
    return next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))


def rows(setup: Setup) -> Iterator[Row]:
    """Yield tokens a second of both ways, ours divided by transformers', for each case."""
    for case in TINY if setup.tiny else CASES:
        if not setup.wants(str(case)):
            continue
        bench = Bench(case, setup.device)
        sides: dict[str, list[float]] = {"ours": [], "peer": []}
        bench.ours(), bench.peer()
        for repeat in range(setup.repeats):
            order = ("ours", "peer") if repeat % 2 == 0 else ("peer", "ours")
            for side in order:
                spent = cost(getattr(bench, side), setup.device)
                # A shared processor's time says more than the clock; a card's is the clock alone.
                sides[side].append(bench.written / (spent.processor if setup.device == "cpu" else spent.wall))
        measure = "tokens/s of transformers' generate" + (" (processor time)" if setup.device == "cpu" else "")
        yield ratio_row("generate", str(case), measure, sides["ours"], sides["peer"], "{:.1f}", "≥ 1.0")
        if case == SERVED and setup.device == "cpu":
            measure = "tokens/s by llama.cpp's server, of transformers' generate (processor time)"
            if importlib.util.find_spec("xllamacpp") is None:
                yield not_measured("generate", str(case), measure, "xllamacpp is not installed")
            else:
                yield ratio_row("generate", str(case), measure, bench.served(setup.repeats), sides["peer"], "{:.1f}")
