"""The table of families: each causal language model of transformers, tiny and random, through every use of it here.

    python tests/benchmarks/families.py [--only llama,qwen3] [--columns adapter,packed] [--every 4/0] [--to FILE]

Each family runs in a forked process with a time limit, and its lines in the file (JSON lines) are kept: a second start
tries only the columns that are not there. A later line counts before an earlier one. A column says `works`, `refused`
(a line for the user), `wrong` (another model's answers), `crashed` (any other exception) or `slow`. `--table FILE`
prints the file as Markdown.
"""

from __future__ import annotations

import forked  # first: it sets the environment of a process that forks  # isort: skip

import argparse
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_families

LIMIT = 60
"""Processor seconds of one column: other work on the machine counts for nothing."""
ISSUE = (
    *("llama", "llama4_text", "mistral", "mistral3", "ministral3", "mixtral", "qwen2", "qwen2_5_vl", "qwen3"),
    *("qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_5_text", "gemma2", "gemma3_text", "gemma3n", "gemma4_text", "phi3"),
    *("phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe", "granite", "granitemoehybrid", "olmo3"),
    *("smollm3", "falcon_h1", "nemotron_h", "lfm2", "lfm2_moe", "ernie4_5_moe", "cohere2"),
)
"""The families that people use today: `--only today`."""
TEN = (
    "llama",
    "gemma3n_text",
    "mistral3",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "nemotron_h",
    "lfm2",
    "opt",
)
"""Ten families as different as can be: a test tries them."""


class Wrong(Exception):
    """Answers of another model than the family's own code makes."""


def near(one: Any, other: Any, tolerance: float, what: str) -> str:
    """Return the relative difference as words; raise `Wrong` beyond the tolerance."""
    import torch

    error = float(torch.linalg.vector_norm(one.float() - other.float()) / torch.linalg.vector_norm(other.float()))
    if not error <= tolerance:
        raise Wrong(f"{what} differ by {error:.1e}")
    return f"{error:.0e}"


class Family:
    """A family's tiny checkpoint, and a use of it for every column."""

    def __init__(self, name: str, folder: Path) -> None:
        import torch
        from conftest import passages, save_tokenizer

        self.name, self.folder = name, folder / name
        self.model = str(tiny_families.write(name, self.folder))
        save_tokenizer(self.folder, passages(12), tiny_families.TOKENS)
        generator = torch.Generator().manual_seed(1)
        self.ids_BL = torch.randint(0, tiny_families.TOKENS, (2, 40), generator=generator)
        self.positions_BL = torch.arange(40).repeat(2, 1)
        self._full: Any = None

    def logits(self, model: Any, ids_BL: Any = None) -> Any:
        """Return a model's logits, by default on fixed tokens."""
        import torch

        from distill.models.language_model import hidden_states

        with torch.no_grad():
            hidden_BLD = hidden_states(model, self.ids_BL if ids_BL is None else ids_BL, self.positions_BL)
            return model.head.with_rows(tiny_families.TOKENS)(hidden_BLD)

    def teacher(self, **options: Any) -> Any:
        from distill import plugins

        given = {"model": self.model, "compute_dtype": "float32", "quantization": "none", **options}
        return plugins.build(given.pop("class_path", "huggingface"), "teacher", given, {})

    @property
    def full(self) -> Any:
        """The logits of the unquantised teacher."""
        if self._full is None:
            self._full = self.logits(self.teacher())
        return self._full

    def adapter(self) -> str:
        import torch

        teacher = self.teacher()
        whole = tiny_families.whole(self.name, self.folder)
        with torch.no_grad():
            own = whole(input_ids=self.ids_BL, use_cache=False).logits[..., : tiny_families.TOKENS]
        said = near(self.logits(teacher), own, 1e-4, "logits")
        del whole
        kept = sum(parameter.numel() for parameter in teacher.parameters())
        return f"{said}, {kept} parameters"

    def packed(self) -> str:
        from distill.experiment.checks import check_model

        teacher = self.teacher()
        apart = check_model(teacher, "teacher", tiny_families.TOKENS, True, tells=False)
        return "rows" if apart else "positions"

    def nf4(self) -> str:
        """Compare with a plain model that has the dequantised weights; return the share of quantised matrices."""
        from distill.models.packing import packing_of

        teacher, plain = self.teacher(quantization="nf4", **self.allowed), self.teacher()
        share = 1 - packing_of(plain.model).share_left
        tiny_families.in_full(teacher.model, plain.model)
        return f"{share:.0%} quantised, {near(self.logits(teacher), self.logits(plain), 1e-4, 'logits')}"

    def int8(self) -> str:
        """Compare with the unquantised model: activations are rounded too, and a mixture's choices change with them."""
        return near(self.logits(self.teacher(quantization="int8", **self.allowed)), self.full, 0.4, "logits")

    @functools.cached_property
    def allowed(self) -> dict[str, bool]:
        """The option for much that stays unquantised, for a family whose share is small at its published size."""
        from transformers import CONFIG_MAPPING

        from distill.errors import UserError
        from distill.models.packing import MOST_LEFT, packing_of
        from distill.models.streaming import without_weights

        try:
            self.teacher(quantization="nf4")
        except UserError as refusal:
            if "allow_unquantized" not in str(refusal):
                raise
            import torch

            try:
                published = packing_of(without_weights(CONFIG_MAPPING[self.name](), torch.float32, False))
            except Exception:  # a family whose defaults make no model
                raise refusal from None
            if published.share_left > MOST_LEFT:
                raise
            return {"allow_unquantized": True}
        return {}

    def streamed(self) -> str:
        return near(self.logits(self.teacher(class_path="streamed")), self.full, 1e-5, "logits")

    def streamed_nf4(self) -> str:
        resident = self.logits(self.teacher(quantization="nf4", **self.allowed))
        given = {"quantization": "nf4", "quantized_copy": str(self.folder.parent / "copy"), **self.allowed}
        return near(self.logits(self.teacher(class_path="streamed", **given)), resident, 1e-5, "logits")

    def student(self, name: str, **options: Any) -> Any:
        from distill import plugins

        if name == "pruned":
            options = {"teacher": self.model, "first_samples": self.samples, **options}
        else:
            options = {"model": self.model, **options}
        return plugins.build(name, "student", options, {})

    def samples(self, count: int) -> Any:
        return self.ids_BL[:count], self.positions_BL[:count], self.ids_BL[:count] >= 0

    def depth(self) -> str:
        """Two of four layers stay: the teacher with the others skipped answers so."""
        kept = [0, 3] if "gemma4" in self.name else [0, 2]  # whose last layer is one of its own kind
        student = self.student("pruned", layers=kept)
        teacher = self.teacher()
        skipped(teacher.model, set(kept))
        return near(self.logits(student.eval()), self.logits(teacher), 1e-4, "logits of the teacher without layers")

    def width(self) -> str:
        from distill.errors import UserError

        try:
            student = self.student("pruned", intermediate_size=64, calibration_samples=2)
        except (UserError, ValueError) as refusal:
            if "give experts" not in str(refusal):
                raise
            student = self.student("pruned", experts=4, calibration_samples=2)
        return f"{sum(parameter.numel() for parameter in student.parameters())} parameters"

    def trimming(self) -> str:
        import torch

        student = self.student("huggingface").eval()
        # A tokenizer's first tokens, among them the special ones, stay.
        kept = torch.cat([torch.arange(8), torch.arange(8, tiny_families.TOKENS, 2)])
        inputs = self.ids_BL % len(kept)
        before = self.logits(student, kept[inputs])[..., kept]
        student.keep_tokens(kept)
        from distill.models.language_model import hidden_states

        with torch.no_grad():
            after = student.head(hidden_states(student, inputs, self.positions_BL))
        return near(after, before, 1e-4, "logits of the kept tokens")

    def lora(self) -> str:
        import torch

        student = self.student("lora", rank=4, base_dtype="float32").eval()
        near(self.logits(student), self.full, 1e-4, "logits of untrained adapters")
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        near(self.logits(student.merged().eval()), self.logits(student), 1e-3, "logits of the merged model")
        return f"{sum(parameter.numel() for parameter in trained)} trained"

    def train(self) -> str:
        import torch

        from distill.experiment.checks import check_model
        from distill.models.language_model import hidden_states

        student = self.student("huggingface").train()
        check_model(student, "student", tiny_families.TOKENS, True, trains=True, tells=False)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        losses = []
        positions_BL = torch.arange(20).repeat(2, 2)
        for _ in range(4):
            hidden_BLD = hidden_states(student, self.ids_BL, positions_BL)
            logits = student.head.with_rows(tiny_families.TOKENS)(hidden_BLD)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids_BL[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        if not losses[-1] < losses[0]:
            raise Wrong(f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}")
        return f"{losses[0]:.2f} → {losses[-1]:.2f}"

    def saved(self) -> Path:
        """Return the folder of a finished student."""
        from distill.models.saving import save_language_model
        from distill.models.tokenizers import load_folder_tokenizer

        folder = self.folder.parent / "student"
        if not folder.exists():
            save_language_model(
                self.student("huggingface"), folder, "huggingface", {}, load_folder_tokenizer(self.folder)
            )
        return folder

    def hf(self) -> str:
        import torch
        import transformers

        from distill.export import hf

        hf.HuggingFaceFormat().write(self.saved(), self.folder.parent / "hf")
        again = transformers.AutoModelForCausalLM.from_pretrained(self.folder.parent / "hf", dtype=torch.float32).eval()
        with torch.no_grad():
            own = again(input_ids=self.ids_BL, use_cache=False).logits[..., : tiny_families.TOKENS]
        return near(own, self.full, 1e-4, "logits")

    def gguf(self) -> str:
        from distill.export import gguf

        gguf.write(self.saved(), self.folder.parent / "gguf", "f16")
        return gguf.check(self.saved(), self.folder.parent / "gguf", "f16")

    def plan(self) -> str:
        from distill.errors import UserError

        file = self.folder.parent / "plan.yaml"
        corpus = {"path": str(self.folder.parent / "corpus.jsonl"), "sequence_length": 32}
        Path(corpus["path"]).write_text('{"text": "the state of the union"}\n' * 40)
        student = {"class_path": "compact", "options": {"hidden_size": 32, "layers": 2, "heads": 2}}
        content = {"corpus": corpus, "teacher": {"model": self.model}, "student": student}
        file.write_text(json.dumps({**content, "run_dir": str(self.folder.parent / "run")}))
        status = forked.distill_here("plan", str(file), "--card", "12GiB")
        if status not in (0, 3):
            raise UserError(f"plan ended with {status}")
        return "fits" if status == 0 else "does not fit"


COLUMNS: tuple[str, ...] = (
    *("adapter", "packed", "nf4", "int8", "streamed", "streamed_nf4", "depth", "width", "trimming", "lora", "train"),
    *("hf", "gguf", "plan"),
)


def skipped(model: Any, kept: set[int]) -> None:
    """Make a model's layers but `kept` pass their input on, as the forward of the family's own code calls them."""
    from teachers.streamed import decoder_layers

    for index, prefix in enumerate(decoder_layers(model)):
        if index not in kept:
            layer = model.get_submodule(prefix.rstrip("."))
            layer.forward = _passing(layer.forward)


def _passing(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden.clone()  # a layer may add to its input in place
        out = own(*args, **kwargs)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return forward


def judge(work: Callable[[], str]) -> tuple[str, str]:
    """Return the verdict on a column, and its words."""
    from distill.errors import UserError, first_line

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        return "works", work()
    except (UserError, ValueError) as refusal:
        return "refused", first_line(refusal)
    except Wrong as error:
        return "wrong", str(error)
    except TimeoutError:
        return "slow", f"more than {LIMIT} s"
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def child(name: str, columns: list[str], answers: Path) -> None:
    """Judge a family's columns, one line each; the file tells of a process that died where it stopped."""
    folder = Path(tempfile.mkdtemp())
    try:
        made: list[Family] = []
        verdict = judge(lambda: (made.append(Family(name, folder)), "")[1])
        with answers.open("a") as file:
            if not made:
                file.write(json.dumps(["built", "crashed", verdict[1], 0]) + "\n")
            for column in columns if made else ():
                began = time.process_time()
                verdict = judge(getattr(made[0], column))
                print(json.dumps([column, *verdict, round(time.process_time() - began, 1)]), file=file, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tried(name: str, columns: list[str]) -> dict[str, list[Any]]:
    """Return the verdicts on a family: column → verdict, words, processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        answers.touch()
        process = os.fork()
        if process == 0:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            try:
                child(name, columns, answers)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 10 * LIMIT + LIMIT * len(columns)
        while not forked.exited(process):
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        os.waitpid(process, 0)
        found = {column: said for column, *said in map(json.loads, answers.open())}
    if "built" not in found:
        for column in columns:
            found.setdefault(column, ["crashed", "the process died", 0])
    return found


def read(file: Path) -> dict[str, dict[str, list[Any]]]:
    """Return the verdicts of a file: family → column → the last verdict, its words and seconds."""
    found: dict[str, dict[str, list[Any]]] = {}
    for line in map(json.loads, file.open()):
        found.setdefault(line["family"], {}).update(line["found"])
    return found


def table(lines: dict[str, dict[str, list[Any]]]) -> str:
    """Return the families and their verdicts as Markdown, with the sums of each column."""
    short = {"works": "✓", "refused": "–", "wrong": "WRONG", "crashed": "CRASH", "slow": "slow"}
    rows = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in lines.items():
        cells = [
            short.get(found.get(column, [""])[0], "not built" if "built" in found else "")
            + (" rows" if found.get(column, [])[:2] == ["works", "rows"] else "")
            for column in COLUMNS
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    sums = {column: Counter(found[column][0] for found in lines.values() if column in found) for column in COLUMNS}
    rows += ["", *(f"* {column}: {dict(counts)}" for column, counts in sums.items() if counts)]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="families, or `today`, `ten`, `causal`, `wrappers`")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--every", default="1/0", help="N/I: every Nth family, from the Ith")
    parser.add_argument("--to", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table is not None:
        print(table(read(options.table)))
        return
    sets = {"today": list(ISSUE), "ten": list(TEN)}
    sets |= {"causal": tiny_families.causal_families(), "wrappers": tiny_families.seeing_families()}
    every = sorted({*sets["causal"], *sets["wrappers"]})
    names = sets.get(options.only) or (options.only.split(",") if options.only else every)
    step, first = map(int, options.every.split("/"))
    options.to.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.to) if options.to.exists() else {}
    _prepare()
    for name in names[first::step]:
        columns = [column for column in options.columns.split(",") if column not in done.get(name, {})]
        if not columns or "built" in done.get(name, {}):
            continue
        found = tried(name, columns)
        with options.to.open("a") as file:
            file.write(json.dumps({"family": name, "found": found}) + "\n")
        verdicts, seconds = Counter(said[0] for said in found.values()), sum(said[2] for said in found.values())
        print(f"{name}: {dict(verdicts)} in {seconds:.0f} s", flush=True)
        for column, (verdict, words, _) in found.items():
            if verdict in ("wrong", "crashed", "slow"):
                print(f"    {column} {verdict}: {words}", flush=True)


def _prepare() -> None:
    """Import what every child needs, once."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers

    import distill.cli
    import distill.experiment.checks
    import distill.export.gguf
    import distill.recipes.plan  # noqa: F401

    torch.set_num_threads(1)
    assert transformers.AutoModelForCausalLM and sys.path


if __name__ == "__main__":
    main()
