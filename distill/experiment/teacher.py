"""The experiment's teacher, and its corpus in the teacher's tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from distill import plugins
from distill.corpus import SampleSets, open_corpus
from distill.experiment.checks import check_length, check_model
from distill.experiment.configuration import Experiment
from distill.models import checkpoints, devices, tokenizers
from distill.models.generation import context_of


class Teacher:
    """The experiment's teacher: what is cheap to know at once, the model itself when it is asked for."""

    def __init__(self, experiment: Experiment) -> None:
        self.config = experiment.teacher
        self.checkpoint = checkpoints.resolve(self.config.model, self.config.revision, self.config.trust_remote_code)
        self.tokenizer = tokenizers.load_tokenizer(
            self.checkpoint, self.config.tokenizer, self.config.trust_remote_code
        )
        self.vocab_size = tokenizers.vocab_size(self.tokenizer)
        self.device = devices.pick_device(experiment.train.accelerator)
        self.compute_dtype = devices.compute_dtype(self.config.compute_dtype, self.device)
        config = checkpoints.load_config(self.checkpoint, self.config.trust_remote_code)
        self.hidden_size: int = config.get_text_config().hidden_size
        self.sequence_length = experiment.corpus.sequence_length
        check_length(context_of(config), self.checkpoint.name, self.sequence_length)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """teacher_config, teacher_weights, quantization, tokenizer, chat_template."""
        weights = checkpoints.fingerprints(self.checkpoint)
        return {
            "teacher_config": weights["config"],
            "teacher_weights": weights["weights"],
            "quantization": f"{self.config.quantization}, {self.compute_dtype}",
            **tokenizers.tokenizer_fingerprint(self.tokenizer),
        }

    def load(self, pack: bool) -> Any:
        """The model on its device; checked that it can read the vocabulary and, packed, keeps documents apart."""
        offered = {
            "model": self.config.model,
            "quantization": self.config.quantization,
            "compute_dtype": self.compute_dtype,
            "device": str(self.device),
            "revision": self.config.revision,
            "trust_remote_code": self.config.trust_remote_code,
        }
        model = plugins.build(self.config.class_path, "teacher", self.config.options, offered)
        name = f"teacher {self.config.model}"
        check_model(model, name, self.vocab_size, pack, length=self.sequence_length)
        return model


def open_samples(experiment: Experiment, teacher: Teacher) -> SampleSets:
    """The corpus as samples of the teacher's tokens."""
    corpus = experiment.corpus
    return open_corpus(
        corpus.path,
        teacher.tokenizer,
        sequence_length=corpus.sequence_length,
        name=corpus.name,
        split=corpus.split,
        text_field=corpus.text_field,
        messages_field=corpus.messages_field,
        pack=corpus.pack,
        held_out=corpus.held_out,
        seed=corpus.seed,
    )
