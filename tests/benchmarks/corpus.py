"""Reading, tokenising and packing a corpus against the bare tokenizer: `make bench ARGS="--only corpus"`.

The bare tokenizer is the same one, called once on the list of all texts, which are in memory already. Ours begins at
the file and ends with every sample read; its tables are made anew each time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
from paired import Row, Setup, paired

from distill.corpus import open_corpus
from distill.models import checkpoints, tokenizers

SPEECHES = Path(__file__).resolve().parents[2] / "data" / "sotu.jsonl"
TINY = 2
"""Documents of a tiny corpus."""


def rows(setup: Setup) -> Iterator[Row]:
    """Yield the time of the demo's corpus, in that of the bare tokenizer."""
    tokenizer = tokenizers.load_tokenizer(checkpoints.resolve("smollm2-135m-demo"))
    lines = SPEECHES.read_text(encoding="utf-8").splitlines()[: TINY if setup.tiny else None]
    texts = [json.loads(line)["text"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corpus.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        runs = iter(range(1_000_000))

        def ours() -> None:
            datasets.config.HF_DATASETS_CACHE = Path(folder) / f"tables{next(runs)}"
            sets = open_corpus(str(file), tokenizer, sequence_length=1024, held_out=0)
            for index in range(len(sets.train)):
                sets.train[index]

        found = paired(ours, lambda: tokenizer(texts), setup)
    case = f"{len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} M characters"
    yield found.time_row("corpus", case, "time of the bare tokenizer")
