"""A separate program that opens an exported folder as its users do: with transformers and torch, and nothing of ours.

Run as `python -I alone.py`. The request comes as JSON on standard input; token ids and logits go back as safetensors on
standard output. Heavy imports come late, because the place where transformers keeps copies of code is set before.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any


def main() -> None:
    for name in ("distill", "teachers", "students"):
        sys.modules[name] = None  # type: ignore[assignment]  # importing any of them fails from here on
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's prints go to standard error and stay out of the answer
    with tempfile.TemporaryDirectory() as modules:
        os.environ["HF_MODULES_CACHE"] = modules
        content = look(request)
    assert not any(name.split(".")[0] == "distill" and module for name, module in sys.modules.items())
    answer.write(content)
    answer.close()


def look(request: dict[str, Any]) -> bytes:
    """Return `ids.<text>` and `<dtype>.<text>` for each text and dtype of `{folder, texts, limit, dtypes, trust}`."""
    import torch
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=False)  # None would ask the user
    rows = [list(tokenizer(text).input_ids)[: request["limit"]] for text in request["texts"]]
    rows = [row for row in rows if row]
    found = {f"ids.{index}": torch.tensor(row) for index, row in enumerate(rows)}
    for dtype in request["dtypes"]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            request["folder"], dtype=dtype, trust_remote_code=request["trust"], output_loading_info=True
        )
        model, report = loaded
        lost = sorted(
            str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]
        )
        if lost:
            raise ValueError(f"weights that do not fit: {', '.join(lost[:3])}")
        with torch.no_grad():
            for index, row in enumerate(rows):
                logits = model(input_ids=torch.tensor([row])).logits[0]
                found[f"{dtype}.{index}"] = logits.float().contiguous()
    return save(found)


if __name__ == "__main__":
    main()
