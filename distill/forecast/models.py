"""The experiment's teacher and student without their weights: a `config.json` is enough, or a published name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import plugins
from distill.cache.format.folder import MANIFEST, Manifest, read_manifest
from distill.errors import UserError, did_you_mean
from distill.experiment.cache import make_scheme
from distill.experiment.checks import check_length
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.student import offered_options
from distill.experiment.training import Role, make_module
from distill.forecast.machine.cards import Card
from distill.forecast.published import published_models
from distill.models import checkpoints, tokenizers
from distill.models.checkpoints import Checkpoint
from distill.models.contract import checked_head
from distill.models.generation import context_length, context_of
from distill.models.language_model import Head
from distill.models.shapes import Find, shapes_alone
from distill.system.quiet import quiet_transformers
from distill.targets.schemes import parameters
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.module import DistillationModule


class Models:
    """What an experiment's models are, as far as their shapes tell. To be used inside `configurations_alone`."""

    def __init__(self, experiment: Experiment, card: Card, notes: list[str]) -> None:
        """`notes`: what had to be assumed is added to it."""
        self.experiment, self.card, self.notes = experiment, card, notes
        teacher = experiment.teacher
        with quiet_transformers():
            self.checkpoint = checkpoints.resolve(teacher.model, teacher.revision, teacher.trust_remote_code)
            config = checkpoints.load_config(self.checkpoint, teacher.trust_remote_code).get_text_config()
        check_length(context_of(config), self.checkpoint.name, experiment.corpus.sequence_length)
        self.hidden_size: int = config.hidden_size
        self.vocab_size = self._vocab_size(config)
        if experiment.student.vocabulary == "corpus":
            self.note("student.vocabulary corpus: its tokens are counted in the cache; all of them are assumed here")

    def teacher(self) -> Any:
        """The teacher on a CPU, as it would be on the card."""
        config = self.experiment.teacher
        offered = {
            "model": config.model,
            "quantization": config.quantization,
            "compute_dtype": self.compute_dtype,
            "device": "cpu",
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        return plugins.build(config.class_path, "teacher", config.options, offered)

    def student(self) -> Any:
        """A fresh student on a CPU, in the type it is made in."""
        student = self.experiment.student
        offered = offered_options(self.experiment, self.vocab_size, None, "cpu")
        model = plugins.build(student.class_path, "student", student.options, offered)
        name = f"student {student.class_path}"
        check_length(context_length(model), name, self.experiment.corpus.sequence_length)
        checked_head(model, name, self.vocab_size)
        return model

    def module(self, role: Role) -> DistillationModule:
        """What a training of the experiment trains, with all its levers."""
        train, manifest = self.experiment.train, self.manifest()
        student = self.student()
        if train.activation_checkpointing:
            try:
                checkpoint_blocks(student, train.checkpoint_every_k)
            except ValueError as error:
                name = self.experiment.student.class_path
                raise UserError(f"student {name}: {error}: leave --train.activation_checkpointing off") from None
        if train.precision == "bf16-true":
            student.to(torch.bfloat16)
        head = None
        if self.experiment.cache.scheme == "hidden":
            dtype = getattr(torch, self.compute_dtype)
            head = Head(torch.empty(self.vocab_size, self.hidden_size, dtype=dtype))
        # Fake tensors are a CPU's whatever the card is.
        experiment = replace(self.experiment, train=replace(train, accelerator="cpu"))
        return make_module(
            experiment, role, student, self.vocab_size, manifest, head, "cuda" if self.card.is_cuda else "cpu"
        )

    @property
    def compute_dtype(self) -> str:
        """The teacher's, on this card."""
        asked = self.experiment.teacher.compute_dtype
        if asked != "auto":
            return asked
        return "float32" if not self.card.is_cuda else "bfloat16" if self.card.has_bf16 else "float16"

    def manifest(self) -> Manifest:
        """What a training reads of a cache's manifest."""
        experiment, scheme = self.experiment, make_scheme(self.experiment, self.hidden_size)
        return Manifest(
            scheme=scheme.name,
            scheme_parameters=parameters(scheme),
            temperature=experiment.cache.temperature,
            seed=experiment.cache.seed,
            vocab_size=self.vocab_size,
            sequence_length=experiment.corpus.sequence_length,
            pack=experiment.corpus.pack,
            shard_samples=experiment.cache.shard_samples,
            splits={},
            fingerprints={},
            made_with={},
        )

    def _vocab_size(self, config: Any) -> int:
        """Tokens of the teacher's tokenizer: its own, a finished cache's word for it, or what is published."""
        teacher, facts = self.experiment.teacher, published_models().get(self.experiment.teacher.model)
        cache = Folders.of(self.experiment).cache
        if (cache / MANIFEST).is_file():
            return read_manifest(cache).vocab_size
        if teacher.tokenizer is not None and (facts is None or Path(teacher.tokenizer).expanduser().exists()):
            return tokenizers.vocab_size(tokenizers.load_tokenizer(self.checkpoint, teacher.tokenizer))
        if teacher.tokenizer is not None and facts is not None:
            alone = teacher.tokenizer.endswith(".model") and facts.sentencepiece_tokens
            tokens = alone or facts.tokens
            self.note(f"teacher.tokenizer {teacher.tokenizer}: not here yet; {tokens:,} tokens assumed, as published")
            return tokens
        folder = self.checkpoint.folder
        if self.checkpoint.gguf_file or any(any(folder.glob(pattern)) for pattern in tokenizers.TOKENIZER_FILES):
            tokenizer = tokenizers.load_tokenizer(self.checkpoint, trust_remote_code=teacher.trust_remote_code)
            return tokenizers.vocab_size(tokenizer)
        if facts is not None:
            return facts.tokens
        self.note(f"teacher {teacher.model}: no tokenizer here; {config.vocab_size:,} tokens assumed, its head's rows")
        return int(config.vocab_size)

    def note(self, text: str) -> None:
        """Something that was assumed, told once."""
        if text not in self.notes:
            self.notes.append(text)


@contextmanager
def configurations_alone(notes: list[str]) -> Iterator[None]:
    """Inside, a hub name is what this machine has of it, its published architecture, or its `config.json`, fetched."""
    with tempfile.TemporaryDirectory() as folder, shapes_alone(_finder(Path(folder), notes)):
        yield


def _finder(folder: Path, notes: list[str]) -> Find:
    def find(name: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
        import huggingface_hub

        try:
            file = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
        except huggingface_hub.errors.HFValidationError:
            file = None
        if isinstance(file, str):
            return Checkpoint(Path(file).parent, None, name)
        model = published_models().get(name)
        if model is not None:
            note = f"{name}: not on this machine; its published architecture was used"
            if note not in notes:
                notes.append(note)
            return Checkpoint(model.write_config(folder / name.replace("/", "--")), None, name)
        try:
            return checkpoints.download(name, revision, trust_remote_code, ["config.json"])
        except UserError as error:
            near = did_you_mean(name, published_models())
            raise UserError(f"{error}; its config.json in a folder is enough to plan{near}") from None

    return find


def size_of(model: nn.Module) -> dict[str, int]:
    """Parameters (those of 4-bit layers are `packed_parameters`), trained ones, and their bytes as they are kept.

    `bytes_read`: of a streamed teacher, from disk for every batch.
    """
    weights = list(model.parameters())
    packed = [weight for weight in weights if not weight.is_floating_point()]
    trained = [weight for weight in weights if weight.requires_grad]
    return {
        "parameters": sum(weight.numel() for weight in weights if weight.is_floating_point()),
        "packed_parameters": 2 * sum(weight.numel() for weight in packed),
        "trained_parameters": sum(weight.numel() for weight in trained),
        "trained_bytes": sum(weight.nbytes for weight in trained),
        "bytes": sum(weight.nbytes for weight in weights),
        "bytes_read": getattr(model, "bytes_read", 0),
    }
