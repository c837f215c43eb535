"""A teacher that is a mixture of experts: host memory, bytes read and tokens a second, resident and streamed.

    python tests/benchmarks/large_teacher.py --folder /tmp/mixture [--layers 30]

writes a random mixture of about 3.2 GB in bfloat16 and runs each way in a process of its own, whose peak of memory
(`ru_maxrss`) is measured; a process that only imports is the zero. What is read twice may come from the page cache.
"""

from __future__ import annotations

import argparse
import json
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

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    size, inner, ones = 1024, 512, torch.ones(1024, dtype=torch.bfloat16)
    write(
        "rest.safetensors",
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
        write(f"layer-{layer:03d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def work(way: str, folder: Path) -> dict[str, Any]:
    """Do one of the ways in this process, and return what was measured."""
    import torch

    from distill.models.checkpoints import resolve
    from distill.models.quantized_copy import CopyPlan, write_copy
    from teachers.huggingface import load_teacher
    from teachers.streamed import load_streamed_teacher

    copy, found = folder.with_name(folder.name + "-nf4"), {}
    began = time.perf_counter()
    if way == "quantize":
        write_copy(CopyPlan(resolve(str(folder)), "nf4", torch.bfloat16, False, False), copy)
    elif way != "import":
        teacher: Any
        if way == "resident nf4":
            teacher = load_teacher(str(folder), "nf4", "bfloat16")
        elif way == "streamed nf4":
            teacher = load_streamed_teacher(str(copy), "nf4", "bfloat16", micro_batch=8)
        else:
            teacher = load_streamed_teacher(str(folder), "none", "bfloat16", micro_batch=8)
        found["load_s"] = time.perf_counter() - began
        found["loaded_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ids_BL = torch.randint(32768, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
        positions_BL = torch.arange(LENGTH).expand(SAMPLES, -1)
        began = time.perf_counter()
        with torch.no_grad():
            for ids, positions in zip(ids_BL.split(8), positions_BL.split(8), strict=True) if "res" in way else ():
                teacher.body(ids, positions)
            if "res" not in way:
                teacher.body(ids_BL, positions_BL)
        found["tokens_per_s"] = SAMPLES * LENGTH / (time.perf_counter() - began)
        found["bytes_read"] = getattr(teacher, "bytes_read", 0)
    found["seconds"] = time.perf_counter() - began
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
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
    print("| way | peak loaded, less imports (GB) | after a batch (GB) | read a batch (GB) | tokens/s | load (s) |")
    print("|---|---|---|---|---|---|")
    zero = 0
    for way in ("import", "quantize", "resident nf4", "streamed nf4", "streamed none"):
        command = [sys.executable, __file__, "--folder", str(options.folder), "--way", way]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if way == "import":
            zero = found["peak_bytes"]
            continue
        print(
            f"| {way} | {(found.get('loaded_bytes', found['peak_bytes']) - zero) / 1e9:.2f} | "
            f"{(found['peak_bytes'] - zero) / 1e9:.2f} | {found.get('bytes_read', 0) / 1e9:.2f} | "
            f"{found.get('tokens_per_s', 0):.0f} | {found.get('load_s', found['seconds']):.1f} |",
            flush=True,
        )
    print(f"quantised copy {sum(path.stat().st_size for path in copy.glob('*.safetensors')) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
