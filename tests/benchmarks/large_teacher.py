"""A teacher that is a mixture of experts: host memory, bytes read and tokens a second, resident and streamed.

    python tests/benchmarks/large_teacher.py --folder /tmp/mixture [--layers 30] [--airllm PYTHON]

writes a random mixture of about 3.2 GB in bfloat16 and runs each way in a process of its own, whose peak of memory
(`ru_maxrss`) is measured; a process that only imports is the zero. What is read twice may come from the page cache.
Tokens are counted a second of processor time, on one thread, since other programs may keep the machine busy. A
sum of the last hidden states with random signs shows which ways compute the same.
`--airllm` is the interpreter of an environment with airllm 4.0.0 and transformers 4.57.3 (its experts are modules of
their own, as in the checkpoint), which streams the same layers in 16 bits; its 4 bits need a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, LENGTH = 32, 128
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 2048,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint, a file a layer, its experts one by one as published mixtures have them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator, places = torch.Generator().manual_seed(0), {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(torch.bfloat16)

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    size, inner, ones = 1024, 512, torch.ones(1024, dtype=torch.bfloat16)
    write(
        1,
        {
            "model.embed_tokens.weight": random(32768, size),
            "lm_head.weight": random(32768, size),
            "model.norm.weight": ones,
        },
    )
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors = {f"{name}{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
        for part, rows, columns in (("q", 1024, size), ("k", 256, size), ("v", 256, size), ("o", size, 1024)):
            tensors[f"{name}self_attn.{part}_proj.weight"] = random(rows, columns)
        for part in "qk":
            tensors[f"{name}self_attn.{part}_norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
        tensors[f"{name}mlp.gate.weight"] = random(32, size)
        for expert in range(32):
            for part, shape in (("gate", (inner, size)), ("up", (inner, size)), ("down", (size, inner))):
                tensors[f"{name}mlp.experts.{expert}.{part}_proj.weight"] = random(*shape)
        write(layer + 2, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    words = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(words))  # AirLLM opens one
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def batch() -> tuple[Any, Any]:
    """Return token ids and positions `[B, L]`."""
    import torch

    ids_BL = torch.randint(32768, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids_BL, torch.arange(LENGTH).expand(SAMPLES, -1)


def load(way: str, folder: Path, copy: Path) -> tuple[Any, Any]:
    """Return a teacher, and its function of a batch."""
    import torch

    if way == "airllm":
        from airllm import AutoModel

        shards = str(folder.with_name(folder.name + "-airllm"))
        model: Any = AutoModel.from_pretrained(
            str(folder), device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=shards
        )
        return model, lambda ids, positions: model.model.model(input_ids=ids, position_ids=positions, use_cache=False)
    from teachers.huggingface import load_teacher
    from teachers.streamed import load_streamed_teacher

    if way == "resident nf4":
        teacher: Any = load_teacher(str(folder), "nf4", "bfloat16")
    elif way == "streamed nf4":
        teacher = load_streamed_teacher(str(copy), "nf4", "bfloat16")
    else:
        teacher = load_streamed_teacher(str(folder), "none", "bfloat16")
    return teacher, teacher.body


def work(way: str, folder: Path) -> dict[str, Any]:
    """Do one of the ways in this process, and return what was measured."""
    import torch

    copy, found = folder.with_name(folder.name + "-nf4"), {}
    began = time.process_time()
    if way == "import airllm":
        import airllm  # noqa: F401
    elif way == "import":
        import teachers.streamed  # noqa: F401
    elif way == "quantize":
        from distill.models.checkpoints import resolve
        from distill.models.quantized_copy import CopyPlan, write_copy

        write_copy(CopyPlan(resolve(str(folder)), "nf4", torch.bfloat16, False, False), copy)
    else:
        teacher, run = load(way, folder, copy)
        found["load_s"], found["loaded_bytes"] = time.process_time() - began, peak()
        batch_BL = batch()
        began = time.process_time()
        with torch.no_grad():
            hidden_BLD = run(*batch_BL)
        found["tokens_per_s"] = SAMPLES * LENGTH / (time.process_time() - began)
        found["bytes_read"] = getattr(teacher, "bytes_read", 0)
        hidden_BLD = getattr(hidden_BLD, "last_hidden_state", hidden_BLD)
        signs_BD = torch.randn(SAMPLES, hidden_BLD.shape[-1], generator=torch.Generator().manual_seed(2)).sign()
        found["sum"] = (hidden_BLD[:, -1].float() * signs_BD).sum().item()
    found["seconds"] = time.process_time() - began
    found["peak_bytes"] = peak()
    return found


def peak() -> int:
    """Return the peak of this process's memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--airllm", metavar="PYTHON")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(options.way, options.folder)))
        return
    if not options.folder.is_dir():
        make(options.folder, options.layers)
    copy = options.folder.with_name(options.folder.name + "-nf4")
    shutil.rmtree(copy, ignore_errors=True)
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    print(f"checkpoint {size / 1e9:.2f} GB")
    print(
        "| way | peak loaded, less imports (GB) | after a batch (GB) | read a batch (GB) | tokens/s | load (s) | sum |"
    )
    print("|---|---|---|---|---|---|---|")
    ways, zero = ["import", "quantize", "resident nf4", "streamed nf4", "streamed none"], 0
    for way in [*ways, *(["import airllm", "airllm"] if options.airllm else [])]:
        python = options.airllm if "airllm" in way else sys.executable
        command = [python, __file__, "--folder", str(options.folder), "--way", way]
        here = {} if "airllm" in way else {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **here}
        )
        if done.returncode:
            print(f"{way}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if way.startswith("import"):
            zero = found["peak_bytes"]
            continue
        print(
            f"| {way} | {(found.get('loaded_bytes', found['peak_bytes']) - zero) / 1e9:.2f} | "
            f"{(found['peak_bytes'] - zero) / 1e9:.2f} | {found.get('bytes_read', 0) / 1e9:.2f} | "
            f"{found.get('tokens_per_s', 0):.0f} | {found.get('load_s', found['seconds']):.1f} | "
            f"{found.get('sum', 0):.1f} |",
            flush=True,
        )
    print(f"quantised copy {sum(path.stat().st_size for path in copy.glob('*.safetensors')) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
