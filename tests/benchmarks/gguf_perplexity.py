"""Cost of GGUF types for a student: `python tests/benchmarks/gguf_perplexity.py RUN TEXT.jsonl`.

RUN may be a model's folder too. The script writes the student in each type, has llama.cpp read it in separate
processes, and prints a table: size, perplexity beside ours on the last `--tokens` tokens of TEXT.jsonl (field `text`)
in windows of 512 (by llama-cpp-python), texts cut into the same tokens, and the number of tokens of five greedy
continuations that are our own best (by xllamacpp).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from distill.experiment.folders import finished_model
from distill.export import gguf, gguf_check
from distill.models.checkpoints import Checkpoint
from distill.models.generation import context_length
from distill.models.tokenizers import load_tokenizer, vocab_size
from distill.plugins import load_language_model


def tail(checkpoint: Checkpoint, file: Path, tokens: int) -> list[int]:
    """The last tokens of a corpus, which are held out when the corpus was split by its end."""
    tokenizer, ids = load_tokenizer(checkpoint), []
    for line in reversed(file.read_text(encoding="utf-8").splitlines()):
        ids = [*tokenizer.encode(json.loads(line)["text"]), *ids]
        if len(ids) >= tokens:
            break
    return ids[-tokens:]


def _long(checkpoint: Checkpoint, file: Path, ids: list[int]) -> dict[str, float]:
    """Return our mean negative log-likelihood of all the tokens, and llama.cpp's."""
    model = load_language_model(checkpoint.folder)
    windows = gguf_check._windows(ids, min(gguf_check.WINDOW, context_length(model) or gguf_check.WINDOW))
    ours, positions = gguf_check._nll(model, windows, vocab_size(load_tokenizer(checkpoint)))
    request = {"file": str(file), "threads": torch.get_num_threads(), "texts": [], "prompts": [], "windows": windows}
    script = str(Path(__file__).with_name("llama_cpp_python.py"))
    return {"ours": ours, "theirs": gguf_check._ask(request, (script,))["nll"] / positions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2560)
    arguments = parser.parse_args()
    is_model = (arguments.run / "config.json").is_file()
    source = arguments.run if is_model else finished_model(arguments.run)
    checkpoint = Checkpoint(source, None, str(source))
    ids = tail(checkpoint, arguments.text, arguments.tokens)
    print("| type | MB | ours | llama.cpp | difference | same tokens | greedy: best, tied, of |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for type in gguf.TYPES:
            gguf.write(source, Path(name), type)
            file = gguf.file(Path(name), type)
            seen = replace(gguf_check.compare(checkpoint, file, ids), **_long(checkpoint, file, ids))
            texts = f"{seen.texts - len(seen.other_texts)} of {seen.texts}"
            print(
                f"| {type} | {file.stat().st_size / 1e6:.1f} | {math.exp(seen.ours):.3f} | "
                f"{math.exp(seen.theirs):.3f} | {seen.drift:+.3%} | {texts} | "
                f"{seen.best}, {seen.ties}, {seen.continued} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
