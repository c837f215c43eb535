"""Steps of a training: samples, passes and tokens, and lines that tell when they are too few for the student."""

from __future__ import annotations

from dataclasses import dataclass

from distill.experiment.configuration import Experiment
from distill.experiment.search import asked
from distill.experiment.student import Pretrained
from distill.forecast.sizes import Amount

USUAL_STEPS = 200
"""Optimiser steps below which a training is called short. The warm-up and the decay of the learning rate take a quarter
of them, and AdamW's second moment remembers 20 (`train.beta2`)."""
USUAL_TOKENS = 20
"""Tokens a parameter that a model is usually trained on. Source: Hoffmann et al. 2022, "Training compute-optimal large
language models"; students cut out of their teacher have had as many (Muralidharan et al. 2024, Minitron)."""
FEWEST_TOKENS = 1.0
"""Tokens a parameter below which a student that is not pretrained is called untaught."""
USEFUL_EPOCHS = 4
"""Epochs up to which text that is read again teaches about as much as new text. Source: Muennighoff et al. 2023,
"Scaling data-constrained language models"."""


@dataclass(frozen=True)
class Training:
    """Amount of one training of the student."""

    samples: int | None
    """Training samples in the cache. None means that the amount of text is not known."""
    sequence_length: int
    epochs: int
    steps: int
    step_samples: int
    """Samples of an optimiser step on all devices."""
    passes: int
    """Passes of an optimiser step on each device."""
    trained_parameters: int | None
    """Weights that learn. None means that the student cannot be made without memory."""
    is_pretrained: bool
    ends_early: bool = False
    """True if `train.max_steps` ends it before its epochs are read."""

    @classmethod
    def of(cls, experiment: Experiment, amount: Amount, trained_parameters: int | None) -> Training | None:
        """Return the amount of the experiment's training, or None if it is not known before the corpus is read."""
        count, train = steps(experiment, amount), experiment.train
        if count is None:
            return None
        return cls(
            amount.train,
            experiment.corpus.sequence_length,
            train.epochs,
            count,
            step_samples(experiment),
            train.accumulate_grad_batches,
            trained_parameters,
            Pretrained.of(experiment) is not None,
            train.max_steps is not None and (amount.train or 0) * train.epochs // step_samples(experiment) > count,
        )

    @property
    def tokens(self) -> int:
        """Tokens that the student reads, those of repeated epochs each time."""
        return self.steps * self.step_samples * self.sequence_length

    def described(self) -> str:
        """Return the amount in a line."""
        samples = (
            "" if self.samples is None else f"{_counted(self.samples, 'sample')} of {self.sequence_length:,} tokens, "
        )
        passes = f"{_counted(self.step_samples, 'sample')} in {_counted(self.passes, 'pass', 'passes')}"
        return (
            f"{samples}{_counted(self.epochs, 'epoch')}: {_counted(self.steps, 'optimiser step')} of {passes}, "
            f"{self.tokens:,} tokens in all"
        )

    def shortcomings(self) -> list[str]:
        """Return a line for each reason why the student will learn little, with remedies."""
        found = []
        if self.steps < USUAL_STEPS:
            found.append(
                f"few steps: {_counted(self.steps, 'optimiser step')}, where {USUAL_STEPS} and more are usual"
                f"{self._more_steps()}"
            )
        if self.trained_parameters and not self.is_pretrained:
            each = self.tokens / self.trained_parameters
            if each < FEWEST_TOKENS:
                found.append(
                    f"few tokens: {each:.2g} for each of the student's {self.trained_parameters / 1e6:,.1f} M "
                    f"parameters, where {USUAL_TOKENS} are usual: below {FEWEST_TOKENS:g} expect one that has the "
                    "sound of the text and little of its sense. More text helps, or a smaller student "
                    "(student.search), or a pretrained one (student.class_path huggingface or lora), which needs less"
                )
        return found

    def _more_steps(self) -> str:
        """Return the changes of the experiment that make more steps of the same text, as words."""
        if self.ends_early:
            return ": train.max_steps ends it there"
        ways = []
        if self.samples is not None:
            if self.passes > 1:
                each = self.step_samples // self.passes
                ways.append(f"--train.accumulate_grad_batches 1 makes {self.samples * self.epochs // each:,}")
            if self.epochs < USEFUL_EPOCHS:
                more = self.samples * USEFUL_EPOCHS // self.step_samples
                ways.append(f"--train.epochs {USEFUL_EPOCHS} makes {more:,}")
        return ": " + ", ".join([*ways, "more text helps most"])


def step_samples(experiment: Experiment) -> int:
    """Return the samples of an optimiser step on all devices."""
    train = experiment.train
    return train.samples_of_step * train.devices * train.num_nodes


def steps(experiment: Experiment, amount: Amount) -> int | None:
    """Return the optimiser steps of a training, or None if the amount of text is not known."""
    train = experiment.train
    if amount.train is None:
        return train.max_steps
    count = max(1, amount.train * train.epochs // step_samples(experiment))
    return count if train.max_steps is None else min(count, train.max_steps)


def searched(experiment: Experiment, amount: Amount, total: int) -> float:
    """Return the work of the search for the student's sizes, in steps; 0 if they are given or found."""
    search = asked(experiment)
    if search is None:
        return 0.0
    tries = search.tries(search.candidates, total)
    return sum(tries) + len(tries) * amount.held_out / step_samples(experiment) / 3


def _counted(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
