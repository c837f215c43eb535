"""Traps in a model's folder, one a case, and the command that opens it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Setter = Callable[[Path, Path], list[str]]
"""(folder of the case, folder outside) -> the command's arguments, after the trap was set."""


@dataclass(frozen=True)
class Trap:
    """One hostile folder or file."""

    name: str
    set: Setter
    statuses: tuple[int, ...] = (2,)
    """Exit statuses that are right: refused, and where it is harmless 0, or 1 for a difference that was found."""
    inside: str = "."
    """Folder in which the command runs, in the case's."""

    def where(self, place: Path) -> Path:
        """Return the folder to be in."""
        return place / self.inside


TRAPS: list[Trap] = []


def add(name: str, *statuses: int, inside: str = ".") -> Callable[[Setter], Setter]:
    """Register a trap."""

    def register(setter: Setter) -> Setter:
        TRAPS.append(Trap(name, setter, statuses or (2,), inside))
        return setter

    return register


def change(path: Path, **content: Any) -> None:
    """Add to a JSON file."""
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**there, **content}))


def link(path: Path, target: Path | str) -> None:
    """Put a link in the place of a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def chat(folder: Path) -> list[str]:
    return ["chat", str(folder), "--max_new_tokens", "2"]


def export(place: Path, *options: str) -> list[str]:
    return ["export", str(place / "run"), "--to", str(place / "out"), *options]


# student.json: whose code is run.


def asking(class_path: str, options: dict[str, Any], command: str) -> Setter:
    def set_trap(place: Path, outside: Path) -> list[str]:
        for folder in (place / "run", place / "run/student"):
            shutil.copy(outside / "evil.py", folder / "evil.py")
        (place / "run/link").symlink_to(outside)
        wanted = class_path.replace("OUTSIDE", str(outside))
        (place / "run/student/student.json").write_text(json.dumps({"class_path": wanted, "options": options}))
        commands = {
            "chat": chat(place / "run"),
            "here": chat(Path(".")),
            "export": export(place, "--with_code"),
            "onnx": export(place, "--format", "onnx"),
            "evaluate": ["evaluate", str(place / "experiment.yaml")],
        }
        return commands[command]

    return set_trap


CODE = {
    "code in the folder": ("run/student/evil.py:Model", "chat", "."),
    "code beside the folder": ("evil.py:Model", "here", "run"),
    "a dotted module": ("evil:Model", "here", "run/student"),
    "a dotted module below": ("run.student.evil:Model", "export", "."),
    "code behind a link": ("link/evil.py:Model", "onnx", "run"),
    "code elsewhere": ("OUTSIDE/evil.py:make", "export", "."),
    "a function that is installed": ("os:system", "chat", "."),
    "a class that is installed": ("torch.nn:Linear", "chat", "."),
    "code under the experiment's eyes": ("evil.py:Model", "evaluate", "run"),
}
for _name, (_class_path, _command, _inside) in CODE.items():
    add(f"student.json: {_name}", inside=_inside)(asking(_class_path, {"command": "touch ran"}, _command))
for _class_path in ("huggingface", "lora", "pruned"):
    _options = {"model": "OUTSIDE", "teacher": "org/name", "trust_remote_code": True}
    add(f"student.json: {_class_path} that trusts")(asking(_class_path, _options, "chat"))
    add(f"student.json: {_class_path} of another folder")(asking(_class_path, {"model": "../../outside"}, "export"))


@add("student.json: a pipe")
def _(place: Path, outside: Path) -> list[str]:
    pipe(place / "run/student/student.json")
    (place / "run/student/config.json").write_text("{}")
    return chat(place / "run")


@add("student.json: nested without end")
def _(place: Path, outside: Path) -> list[str]:
    (place / "run/student/student.json").write_text("[" * 10**6)
    return chat(place / "run")


# A Hugging Face folder.


def model(name: str, setter: Callable[[Path, Path], None], *statuses: int) -> None:
    """Register a trap in the folder `model`, which is opened with `chat` and exported."""

    def opened(command: Callable[[Path], list[str]]) -> Setter:
        def set_trap(place: Path, outside: Path) -> list[str]:
            setter(place / "model", outside)
            return command(place)

        return set_trap

    add(f"model: {name}", *statuses)(opened(lambda place: chat(place / "model")))


def _auto_map(folder: Path, outside: Path) -> None:
    shutil.copy(outside / "evil.py", folder / "evil.py")
    names = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Model"] * 2}
    change(folder / "config.json", auto_map=names, model_type="evil")
    change(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="Model")


def _index(file: str) -> Callable[[Path, Path], None]:
    def setter(folder: Path, outside: Path) -> None:
        (folder / "model.safetensors").unlink()
        content = {"metadata": {}, "weight_map": {"lm_head.weight": file.replace("OUTSIDE", str(outside))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return setter


class Touch:
    """Object whose unpickling runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _pickles(folder: Path, outside: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(outside.parent / "ran")))


def _adapter(folder: Path, outside: Path) -> None:
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(outside), r=2)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(outside.parent / "ran")))


def _template(text: str) -> Callable[[Path, Path], None]:
    return lambda folder, _: (folder / "chat_template.jinja").write_text(text) and None


model("code of its own", _auto_map)
model("an index out of the folder", _index("OUTSIDE/model.safetensors"))
model("an index of a pickle", _index("pytorch_model.bin"))
model("an index upwards", _index("../../outside/model.safetensors"))
model("only pickles", _pickles)
model("a pickled adapter", _adapter)
model("weights elsewhere", lambda f, o: change(f / "config.json", transformers_weights=str(o / "model.safetensors")))
model("a kernel of the hub", lambda f, o: change(f / "config.json", _attn_implementation="evil/kernel"))
for _name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
    model(f"{_name} is a link", lambda f, o, n=_name: link(f / n, o / n))  # type: ignore[misc]
model("layers without end", lambda f, o: change(f / "config.json", num_hidden_layers=10**9))
model("templates elsewhere", lambda f, o: link(f / "additional_chat_templates", o / "secrets"))
model("a tokenizer that is a pipe", lambda f, o: pipe(f / "tokenizer.json"))
model("a configuration without end", lambda f, o: link(f / "tokenizer_config.json", "/dev/zero"))
model(
    "a template without end",
    _template("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"),
)
model("a template that counts without end", _template("{{ 9 ** (9 ** 9) }}"))
model("a template that takes all memory", _template("{{ 'x' * 10 ** 11 }}"))
model("a template that looks for Python", _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"))


@add("model: libraries in the folder", 0, inside="model")
def _(place: Path, outside: Path) -> list[str]:
    for name in ("numpy", "torch", "llama_cpp", "transformers", "tokenizers", "argparse", "json"):
        shutil.copy(outside / "evil.py", place / f"model/{name}.py")
    return ["export", ".", "--to", str(place / "out"), "--format", "gguf"]


@add("run: a report that is a link", 0, 2)
def _(place: Path, outside: Path) -> list[str]:
    link(place / "run/report.md", outside / "secrets/key")
    return export(place, "--with_code")


@add("run: a student elsewhere")
def _(place: Path, outside: Path) -> list[str]:
    shutil.move(place / "run/student", place / "moved")
    link(place / "run/student", outside)
    return export(place)
