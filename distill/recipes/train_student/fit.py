"""The training of the student or a control, from existing checkpoints to the finished folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
import torch

from distill import plugins
from distill.cache.format.tokenizer_files import checked_tokenizer
from distill.cache.reading.mixture import MixedReader
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import Storage
from distill.errors import UserError, first_line
from distill.experiment import settings
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.place import Place
from distill.experiment.roles import Role, rounding_of, training_settings
from distill.experiment.student import first_samples, make_student_to_train
from distill.experiment.training import make_data, make_module, teacher_head
from distill.models.saving import save_language_model
from distill.models.tokenizer_trimming import needed_tokens, trim_tokenizer
from distill.models.tokenizers import load_folder_tokenizer
from distill.models.vocabulary import Vocabulary
from distill.recipes.train_student.texts import make_texts
from distill.system import interrupt, ledger
from distill.system.blame import blamed
from distill.system.processes import leave_if_not_first, together
from distill.system.progress import Progress, say
from distill.system.rank import is_first_process
from distill.targets.kl_name import kl_qualifier
from distill.training.callbacks import ShowProgress
from distill.training.checkpoints import BEST, KeepCheckpoints, is_whole, newest
from distill.training.data import CacheDataModule
from distill.training.held_out import MeasureHeldOut
from distill.training.loggers import make_loggers
from distill.training.parallel import is_sharded
from distill.training.prediction import PredictEnd
from distill.training.texts import WriteTexts
from distill.training.trainer import make_trainer
from distill.training.user_callbacks import make_callbacks
from distill.training.vocabulary import count_tokens, trim_batch
from distill.training.watch import ProbeAgain, TellOfLostSteps, WarnOfFirstLoss


def kept_vocabulary(
    experiment: Experiment, storage: Storage, train: CacheReader | MixedReader, held_out: CacheReader
) -> Vocabulary | None:
    if experiment.student.vocabulary == "full":
        return None
    if experiment.train.begin_from is not None:
        return Vocabulary.load(Folders.of_training(experiment.train.begin_from).model("student"))
    tokenizer = load_folder_tokenizer(checked_tokenizer(storage.folder))
    readers = train.readers if isinstance(train, MixedReader) else [train]
    total = (len(train) + len(held_out)) * train.manifest.sequence_length
    with Progress("count tokens", total, "tokens") as progress:
        counts_V = count_tokens([*readers, held_out], train.manifest.vocab_size, progress.advance)
    vocabulary = needed_tokens(tokenizer, counts_V)
    say(f"vocabulary: {len(vocabulary):,} of the teacher's {vocabulary.full_size:,} tokens{_mass(train, vocabulary)}")
    return vocabulary


def _mass(train: CacheReader | MixedReader, vocabulary: Vocabulary) -> str:
    """Return a text with the teacher's mass on the dropped tokens, on the first samples; empty unless it is known."""
    batch = train.collate([train[index] for index in range(min(len(train), 64))])
    _, dropped = trim_batch(batch, vocabulary)
    if dropped is None:
        return ""
    return f"; it gives {float(dropped) / max(len(batch.entropy_N), 1):.2%} of its probability to the others"


def _handed_over_in(trained: str) -> Path:
    """Return the checkpoint whose weights a finished training handed over. Raises UserError if it is not there."""
    folders = Folders.of_training(trained)
    stopped_early = settings.read(folders.model("student"))["train"]["early_stopping"] is not None
    best = folders.checkpoints("student") / BEST
    found = best if stopped_early and is_whole(best) else newest(folders.checkpoints("student"))
    if found is None:
        raise UserError(
            f"train.begin_from: {folders.checkpoints('student')}: has no checkpoint any more: remove "
            f"{folders.model('student')}, so that it is trained again"
        )
    return found


class Training:
    """The training of one role, from existing checkpoints to the finished folder."""

    data: CacheDataModule
    held_out: MeasureHeldOut

    def __init__(self, experiment: Experiment, folders: Folders, train: CacheReader | MixedReader, role: Role) -> None:
        self.experiment, self.folders, self.role = experiment, folders, role
        self.place = Place.of(experiment)
        self.train, self.manifest = train, train.manifest
        self.checkpoints = folders.checkpoints(role.name)
        self.best = self.checkpoints / BEST
        self.settings = training_settings(experiment, role, train)

    def fit(self, held_out: CacheReader, vocabulary: Vocabulary | None, deadline: float | None) -> None:
        """Train, and save the student. Raises Interrupted when asked to stop, or at the deadline."""
        name = self.role.name
        self.data = make_data(self.experiment, self.train, held_out, self.role.seed, vocabulary)
        resume_from = self._checkpoint_to_resume()
        student, options = self._student()
        if resume_from is None and self.experiment.train.begin_from is not None:
            self._load(student, _handed_over_in(self.experiment.train.begin_from))
        if is_first_process():
            settings.write(self.checkpoints, self.settings)
        started = time.monotonic()
        with ledger.phase(self.folders.run, "train-student"):
            module = make_module(
                self.experiment,
                self.place,
                self.role,
                student,
                self._vocab_size(),
                teacher_head(self.train, vocabulary),
            )
            progress = Progress(f"train {name}", total=0, unit="steps")
            trainer = self._trainer(progress, deadline)
            with progress, interrupt.deferred(), together(trainer), blamed(name):
                # From here Lightning calls `DistillationModule.training_step`.
                trainer.fit(module, datamodule=self.data, ckpt_path=resume_from, weights_only=True)
            leave_if_not_first(trainer)
            if module.non_finite.skipped:
                say(f"{name}: {module.non_finite.skipped} of {module.steps_begun} steps were left out (not finite)")
            self._save(self._handed_over(student), options)
        say(f"{name}: {self.folders.model(name)} after {time.monotonic() - started:,.0f} s")

    def _checkpoint_to_resume(self) -> Path | None:
        last = newest(self.checkpoints)
        if last is None:
            return None
        different = settings.differences(self.checkpoints, self.settings)
        if different:
            raise UserError(
                f"{last} is of a training with other settings ({'; '.join(different)}): "
                f"choose another --run_dir, or remove {self.checkpoints}"
            )
        if not self.experiment.train.resume:
            raise UserError(
                f"{last}: an unfinished training of this {self.role.name}: pass --resume to continue it, or remove "
                f"{self.checkpoints}"
            )
        say(f"{self.role.name}: continuing from {last}")
        return last

    def _student(self, tell: Callable[[str], None] = say) -> tuple[Any, dict[str, Any]]:
        """Make a fresh student, checked, and return it with its options."""
        student, options, recomputed = make_student_to_train(
            self.experiment,
            self.place,
            self.manifest.vocab_size,
            first_samples(self.data.train),
            self.data.vocabulary,
        )
        parameters = sum(parameter.numel() for parameter in student.parameters())
        tell(
            f"{self.role.name}: {self.experiment.student.class_path}, {parameters / 1e6:,.1f} M parameters, "
            f"alpha {self.role.alpha:g}"
        )
        if recomputed:
            tell(f"{self.role.name}: activation checkpointing of {recomputed} blocks")
        return student, options

    def _vocab_size(self) -> int:
        return len(self.data.vocabulary) if self.data.vocabulary else self.manifest.vocab_size

    def _trainer(self, progress: Progress, deadline: float | None) -> pl.Trainer:
        config, name = self.experiment.train, self.role.name
        scheme, parameters = self.manifest.scheme, self.manifest.scheme_parameters
        qualifier = kl_qualifier(
            scheme, parameters.get("entries", 0), self.manifest.temperature, trimmed=self.data.vocabulary is not None
        )
        self.held_out = MeasureHeldOut(
            self.data, config.validate_every_steps, self.role.monitor, self.best, config.early_stopping, qualifier
        )
        return make_trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=config.precision,
            epochs=config.epochs,
            max_steps=config.max_steps,
            log_every_steps=config.log_every_steps,
            loggers=make_loggers(
                config.loggers, self.folders.logs(name), f"{self.folders.run.name}-{name}", self.settings
            ),
            callbacks=[
                ShowProgress(progress),
                *self._watch(),
                *make_callbacks(config.callbacks),  # before the one that writes checkpoints, which hold their states
                self._prediction(),
                self.held_out,
                *self._texts(),
                KeepCheckpoints(self.checkpoints, config.checkpoint_every_steps, config.keep_checkpoints, deadline),
            ],
        )

    def _prediction(self) -> PredictEnd:
        """Return the callback that predicts the end of this training."""
        name = self.role.name
        student = str(PurePath(name).with_name("student")) if self.role.is_control else None
        return PredictEnd(
            self.data, name, self.folders.logs(name), None if student is None else self.folders.logs(student)
        )

    def _handed_over(self, student: Any) -> Any:
        """Return the student with the weights that the training is for: those of the best step, or of the last."""
        name = self.role.name
        if self.experiment.train.early_stopping is not None:
            if is_whole(self.best):
                say(f"{name}: the weights of the lowest {self.role.monitor}, {self.held_out.lowest:.4f}")
                return self._with_weights_of(self.best)
            damaged = f"{self.best} is damaged or was never written"
            say(f"{name}: {damaged}: these are the weights of the last step, not the best")
        return self._with_weights_of(newest(self.checkpoints)) if is_sharded(student) else student

    def _texts(self) -> list[WriteTexts]:
        """Return the callback that writes sample texts, if they are asked for."""
        if self.data.held_out is None:
            return []
        return make_texts(self.experiment, self.data.held_out, self.data.vocabulary, self.folders.logs(self.role.name))

    def _watch(self) -> list[pl.Callback]:
        """Return the looks that are taken once, before anything is measured or kept."""
        config, manifest, loss = self.experiment.train, self.manifest, self.experiment.loss
        name, vocab_size = f"student {self.experiment.student.class_path}", self._vocab_size()
        looks: list[pl.Callback] = [
            ProbeAgain(name, vocab_size, manifest.pack, manifest.sequence_length, config.validate_every_steps)
        ]
        is_nats = loss.divergence == "forward_kl" and manifest.temperature == 1 and not loss.feature_weight
        if is_nats or self.role.alpha == 1:
            looks.append(WarnOfFirstLoss(name, vocab_size))
        if config.precision == "bf16-true" and rounding_of(self.experiment) == "nearest":
            looks.append(TellOfLostSteps(name))
        return looks

    def _with_weights_of(self, checkpoint: Path | None) -> Any:
        """Return a student with the weights of a checkpoint."""
        assert checkpoint is not None, "every training ends with a checkpoint"
        student, _ = self._student(tell=lambda message: None)
        self._load(student, checkpoint)
        return student

    def _load(self, student: Any, checkpoint: Path) -> None:
        """Give a student the weights of a checkpoint, which has all that learn.

        Raises UserError for the checkpoint of another student.
        """
        trained = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        prefix = "student."
        own = {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
        learn = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        try:
            unknown = student.load_state_dict(own, strict=False).unexpected_keys
        except RuntimeError as error:
            raise UserError(
                f"{checkpoint}: is of another student than this experiment's ({first_line(error)})"
            ) from error
        if unknown or not learn <= own.keys():
            raise UserError(f"{checkpoint}: is of another student than this experiment's")

    def _save(self, student: Any, options: dict[str, Any]) -> None:
        tokenizer = load_folder_tokenizer(checked_tokenizer(self.data.train.storage.folder))
        vocabulary = self.data.vocabulary
        if vocabulary is not None:
            tokenizer = trim_tokenizer(tokenizer, vocabulary)

        def write_more(new: Path) -> None:
            settings.write(new, self.settings)
            if vocabulary is not None:
                vocabulary.save(new)

        folder, class_path = self.folders.model(self.role.name), self.experiment.student.class_path
        source = plugins.source_of(class_path, "student")
        save_language_model(student, folder, class_path, options, tokenizer, write_more, source)
