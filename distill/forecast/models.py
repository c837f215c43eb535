"""The experiment's teacher and student without their weights: a `config.json` is enough, or a published name."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.cache.format.folder import MANIFEST, read_manifest
from distill.errors import UserError, did_you_mean
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.last_steps import check_tokenizer
from distill.experiment.place import Place
from distill.experiment.roles import Role
from distill.experiment.student import check_tokens, make_student, make_student_to_train
from distill.experiment.teacher import Teacher
from distill.experiment.training import make_module
from distill.forecast.machine.cards import Card
from distill.forecast.published import published_models
from distill.models import checkpoints, tokenizers
from distill.models.checkpoints import Checkpoint
from distill.models.language_model import Head
from distill.models.packing import holds_experts
from distill.models.shapes import Find
from distill.training.module import DistillationModule


class Models:
    """An experiment's models, as far as their shapes tell, made among fake tensors, which the caller provides."""

    def __init__(self, experiment: Experiment, card: Card, notes: list[str]) -> None:
        """Find the teacher; assumptions are added to `notes`."""
        self.experiment, self.notes = experiment, notes
        published = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, published, ignore_errors=True)
        self.place = Place.without_memory(card.is_cuda, card.has_bf16, _finder(Path(published), notes))
        self._teacher = Teacher(experiment, self.place)
        self.checkpoint, self.compute_dtype = self._teacher.checkpoint, self._teacher.compute_dtype
        self.hidden_size = self._teacher.hidden_size
        self.vocab_size = self._vocab_size()
        if experiment.student.vocabulary == "corpus":
            self.note("student.vocabulary corpus: its tokens are counted in the cache; all of them are assumed here")

    def teacher(self) -> Any:
        """Make the teacher on a CPU, as it would be on the card."""
        return self._teacher.load()

    def student(self) -> Any:
        """Make a fresh student on a CPU, in the type it is made in."""
        return make_student(self.experiment, self.place, self.vocab_size)[0]

    def student_to_train(self) -> Any:
        """Make a fresh student on a CPU with the levers of its training."""
        return make_student_to_train(self.experiment, self.place, self.vocab_size)[0]

    def check_tokens(self) -> None:
        """Raise UserError for a teacher's tokenizer that benchmarks refuse, or that a pretrained student does not have.

        It is looked at where it is on this machine; so is the student's.
        """
        name = self.experiment.teacher.tokenizer
        is_here = tokenizers.is_here(self.checkpoint) if name is None else Path(name).expanduser().exists()
        if is_here:
            check_tokenizer(self.experiment, self._teacher.tokenizer)
            check_tokens(self.experiment, self.place, self._teacher.tokenizer)

    def module(self, role: Role) -> DistillationModule:
        """Make the module of a training of the experiment, with all its levers."""
        self.check_tokens()
        student, head = self.student_to_train(), None
        if any(map(holds_experts, student.modules())):
            self.note("student: each expert of the mixture is assumed to get as many tokens")
        if self.experiment.cache.scheme == "hidden":
            head = Head(torch.empty(self.vocab_size, self.hidden_size, dtype=getattr(torch, self.compute_dtype)))
        return make_module(self.experiment, self.place, role, student, self.vocab_size, head)

    def _vocab_size(self) -> int:
        """Return the tokens of the teacher's tokenizer: its own, those of a finished cache, or the published number."""
        teacher, facts = self.experiment.teacher, published_models().get(self.experiment.teacher.model)
        cache = Folders.of(self.experiment).cache
        if (cache / MANIFEST).is_file():
            return read_manifest(cache).vocab_size
        if teacher.tokenizer is not None and (facts is None or Path(teacher.tokenizer).expanduser().exists()):
            return self._teacher.vocab_size
        if teacher.tokenizer is not None and facts is not None:
            alone = teacher.tokenizer.endswith(".model") and facts.sentencepiece_tokens
            tokens = alone or facts.tokens
            self.note(f"teacher.tokenizer {teacher.tokenizer}: not here yet; {tokens:,} tokens assumed, as published")
            return tokens
        if tokenizers.is_here(self.checkpoint):
            return self._teacher.vocab_size
        if facts is not None:
            return facts.tokens
        rows = int(self._teacher.shape.vocab_size)
        self.note(f"teacher {teacher.model}: no tokenizer here; {rows:,} tokens assumed, its head's rows")
        return rows

    def note(self, text: str) -> None:
        """Add an assumption, once."""
        if text not in self.notes:
            self.notes.append(text)


def _finder(folder: Path, notes: list[str]) -> Find:
    """Return a function that finds the configuration of a hub name: on this machine, published here, or on the hub."""

    def find(name: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
        if (checkpoint := checkpoints.kept(name, revision)) is not None:
            return checkpoint
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
    """Return parameters (those of 4-bit layers are `packed_parameters`), trained ones, and their bytes as kept.

    `bytes_read` is the number that a streamed teacher reads from disk for every batch, `host_bytes` those of its layers
    in the host's memory, `copy_bytes` those of its quantised copy on disk; `head_bytes` are the head's. `goes_together`
    is 1 for a teacher that takes several batches through its layers together.
    """
    weights, head = list(model.parameters()), getattr(model, "head", None)
    packed = [
        (2 if weight.dtype is torch.uint8 else 1) * weight.numel()
        for weight in weights
        if not weight.is_floating_point()
    ]
    trained = [weight for weight in weights if weight.requires_grad]
    return {
        "parameters": sum(weight.numel() for weight in weights if weight.is_floating_point()),
        "packed_parameters": sum(packed),
        "trained_parameters": sum(weight.numel() for weight in trained),
        "trained_bytes": sum(weight.nbytes for weight in trained),
        "bytes": sum(weight.nbytes for weight in weights),
        **{name: getattr(model, name, 0) for name in ("bytes_read", "host_bytes", "copy_bytes")},
        "goes_together": int(hasattr(model, "pace")),
        "head_bytes": 0 if head is None else head.weight_VD.nbytes,
    }
