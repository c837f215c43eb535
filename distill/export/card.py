"""The model card of an exported folder: the report of the run, or else the facts in the student's own folder."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from distill.export.probe import read_object
from distill.models.checkpoints import Checkpoint, weight_files
from distill.system.files import is_inside, last_part, read_bounded

FILE = "README.md"
REPORT = "report.md"

USE = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
inputs = tokenizer("The state of the union", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
""",
    "onnx": """\
`model.onnx` takes `input_ids` `[batch, sequence]` (int64) and gives `logits` `[batch, sequence, vocabulary]` (float32).
It takes no attention mask: pad on the right, where a causal model does not look, and leave those logits out.

```python
import numpy, onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = onnxruntime.InferenceSession("{name}/model.onnx")
ids = numpy.array([tokenizer("The state of the union").input_ids])
logits = model.run(["logits"], {{"input_ids": ids}})[0]
print(tokenizer.decode(logits[0, -1].argmax()))
```
""",
    "gguf": """\
Open the `.gguf` file with llama.cpp, or whatever is made from it.
""",
    "own": """\
Its class is not here: `distill pull URL --to {name}`, then `distill chat {name} --class_path my_file.py:MyStudent`.
""",
}


def write_card(source: Path, folder: Path, name: str, format: str, checked: str) -> None:
    """Write `README.md`, unless the format itself wrote one. `checked` says what was compared."""
    card = folder / FILE
    if not card.exists():
        card.write_bytes(card_of(source, folder, name, format, checked))


def card_of(source: Path, folder: Path, name: str, format: str, checked: str | None = None) -> bytes:
    """Return the card of a student of ours in `source`, as it is in `folder`: its run's report, or the facts."""
    report = source.parent / REPORT
    if source.name == "student" and report.is_file() and is_inside(report, source.parent):
        return read_bounded(report)
    return short_card(source, folder, name, format, checked).encode()


def short_card(source: Path, folder: Path, name: str, format: str, checked: str | None) -> str:
    """Return a card of the facts in the folders. It contains no path of this machine."""
    settings = read_object(source / "settings.json")
    student, cache = settings.get("student", {}), settings.get("cache", {})
    rows = {
        "parameters": f"{_parameters(source):,}",
        "made by": "`" + _last(str(student["class_path"])) + "`" if "class_path" in student else None,
        "teacher": _last(str(settings["teacher"])) if "teacher" in settings else None,
        "learnt from": "samples of {:,} tokens".format(cache["sequence_length"])
        if "sequence_length" in cache
        else None,
        "checked": checked,
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value is not None)
    trust = ", trust_remote_code=True" if list(folder.glob("modeling_*.py")) else ""
    library = "library_name: transformers\n" if format == "hf" else ""
    return (
        f"---\n{library}pipeline_tag: text-generation\ntags:\n- distillation\n---\n\n# {name}\n\n"
        "A small language model that learnt from a larger one.\n\n"
        f"| | |\n|---|---|\n{table}\n## Use\n\n{USE[format].format(name=name, trust=trust)}\n"
        "## Licence\n\nFor the publisher to name: the teacher's applies, and that of the text it was taught with.\n"
    )


def _last(name: str) -> str:
    """Return a hub name unchanged, and the last part of a path, which says more about a machine than about a model."""
    is_path = ".py:" in name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return last_part(name) if is_path else name


def _parameters(source: Path) -> int:
    """Count the numbers in the weight files, which hold a tied weight once."""
    total = 0
    for path in weight_files(Checkpoint(source, None, str(source))):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
