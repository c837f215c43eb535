"""Tiny models, and a tiny world for tests that run commands: teacher, corpus, experiment file, and the command line."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as a command sets it, of which some are forks of this process

# A suite says the same twice: random tests draw the same examples each time. tests/benchmarks/fuzz.py searches on.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOISY_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "transformers", "bitsandbytes", "datasets")


def pytest_collection_finish() -> None:
    """Freeze what was imported: commands that drop a model would look through a million objects for its remains."""
    gc.collect()
    gc.freeze()


def passages(number: int) -> list[str]:
    """Real sentences, about 300 characters each: the beginnings of the demo's speeches."""
    with open(ROOT / "data" / "sotu.jsonl", encoding="utf-8") as file:
        text = " ".join(json.loads(line)["text"] for line, _ in zip(file, range(3), strict=False))
    return [text[start : start + 300] for start in range(0, 300 * number, 300)]


def save_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> int:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8},
}


def save_teacher(
    folder: Path, texts: list[str], family: str = "llama", vocabulary: int = 400, seed: int = 0, **sizes: Any
) -> Path:
    """A tiny random model with its tokenizer as a Hugging Face folder; its head has 13 padding rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.system.quiet import quiet_transformers

    rows = save_tokenizer(folder, texts, vocabulary) + 13
    # The wide initial weights make a teacher of few, sure and position-dependent answers, as real ones are.
    common = {"vocab_size": rows, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.15}
    config = AutoConfig.for_model(family, pad_token_id=None, **{**common, **FAMILIES[family], **sizes})
    torch.manual_seed(seed)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """A command's output and exit status."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def refused(self, *words: str) -> None:
        """Assert exit status 2 and one line that has all the `words`; what was said before it is on stdout."""
        assert self.status == 2, (self.status, self.out, self.err)
        assert len(self.err.splitlines()) == 1 and self.err.startswith("distill: "), self.err
        missing = [word for word in words if word not in self.err]
        assert not missing, (missing, self.err)

    def done(self) -> Outcome:
        """The outcome itself, asserted to be a success that had nothing to complain about."""
        assert (self.status, self.err) == (0, ""), (self.status, self.out, self.err)
        return self


@dataclass(frozen=True)
class World:
    """A folder with a tiny teacher, a corpus of 40 passages and an experiment file that uses both."""

    folder: Path
    content: dict[str, Any]

    def write(self, path: Path, **sections: Any) -> str:
        """Write an experiment file: the world's own with `sections` merged in; its run folder lies beside it.

        Forecasts, which take seconds, are made where `preflight` asks for them.
        """
        content = {key: {**value, **sections.get(key, {})} for key, value in self.content.items()}
        content |= {key: value for key, value in sections.items() if key not in content}
        content = {"preflight": False, **content, "run_dir": str(path.parent / "run")}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    def save_teacher(self, folder: Path, family: str, **sizes: Any) -> Path:
        """Another teacher, of any of `FAMILIES`, with a tokenizer made of the same corpus."""
        return save_teacher(folder, passages(40), family, **sizes)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    import datasets
    import lightning.pytorch  # here, where its log handler takes hold of a stream that lasts  # noqa: F401

    folder = tmp_path_factory.mktemp("world")
    texts = passages(40)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content: dict[str, Any] = {
        "corpus": {"path": str(folder / "corpus.jsonl"), "sequence_length": 48, "held_out": 0.2},
        "teacher": {
            "model": str(save_teacher(folder / "teacher", texts)),
            "quantization": "none",
            "compute_dtype": "float32",
        },
        "cache": {"batch_size": 4, "shard_samples": 8, "held_out_samples": 8},
        "student": {"class_path": "pruned", "options": {"layers": 2}},
        "evaluate": {"cost": False, "texts": 0},
        "train": {
            "batch_size": 4,
            "precision": "32-true",
            "learning_rate": 5e-3,
            "validate_every_steps": 8,
            "log_every_steps": 4,
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))  # for commands in processes of their own
        patch.setenv("HF_HUB_OFFLINE", "1")
        gc.freeze()  # what was imported since the collection
        yield World(folder, content)


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
TINY_OF_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},  # low, so that the cap shows
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 4},
}


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """The `config` of a tiny llama, which leaves the number of tokens to whoever builds it."""
    return {"model_type": "llama", **{key: value for key, value in TINY.items() if key != "vocab_size"}}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model("llama")`: a random `transformers` model of 99 tokens, always the same; sizes as keywords."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str, **sizes: Any) -> Any:
        config = AutoConfig.for_model(family, **{**TINY, **TINY_OF_FAMILY.get(family, {}), **sizes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # away from the initial weights, whose biases are 0 and logits too small to show mistakes
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Undo a command's effects on its process: signal handlers, imports, warnings, log levels, environment."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    path, environment = [*sys.path], dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        sys.path[:] = path
        for name in [name for name in sys.modules if name.startswith("_plugin_")]:
            del sys.modules[name]
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: on a busy machine torch's threads wait for one another longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_traces() -> Iterator[None]:
    with undone():
        yield


@pytest.fixture(scope="session")
def outcome_of() -> Callable[[Callable[[], None]], Outcome]:
    """`outcome_of(work)`: the output and exit status of work in this process that ends with SystemExit."""

    def run(work: Callable[[], None]) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with (
            undone(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            work()
        return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def distill(outcome_of: Any) -> Callable[..., Outcome]:
    """`distill("run", file, "--train.seed", 1)`: the command line in this process; an exception fails the test."""
    from distill.cli import main

    return lambda *arguments: outcome_of(lambda: main([str(argument) for argument in arguments]))


@pytest.fixture(scope="session")
def random_rows() -> Tensor:
    """`[12, 1009]` float32, from open to sure."""
    import torch

    generator = torch.Generator().manual_seed(1)
    sharpness_N1 = torch.linspace(0.2, 6, 12)[:, None]
    return (torch.randn(12, 1009, generator=generator) * sharpness_N1).softmax(-1)


@pytest.fixture(scope="session")
def zipf_rows() -> Tensor:
    """`[16, 1009]` float32: probabilities fall with a power of the rank (1.2 to 2.5), ids in random order."""
    import torch

    generator = torch.Generator().manual_seed(2)
    exponent_N1 = torch.linspace(1.2, 2.5, 16)[:, None]
    logits_NV = -exponent_N1 * torch.arange(1, 1010).log()
    order_NV = torch.rand(16, 1009, generator=generator).argsort(-1)
    return logits_NV.softmax(-1).gather(1, order_NV)
