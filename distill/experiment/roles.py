"""The models that an experiment trains, and the settings that each of them depends on. It imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from distill import plugins
from distill.experiment import settings
from distill.experiment.configuration import Experiment, StudentConfig
from distill.experiment.folders import Folders
from distill.training.optimizers.adamw import choose_rounding
from distill.training.optimizers.rounding import Rounding

if TYPE_CHECKING:  # by statement these take a second
    from distill.cache.reading.mixture import MixedReader
    from distill.cache.reading.reader import CacheReader


@dataclass(frozen=True)
class Role:
    """A model to train: the `student`, or the `control`, which learns from the text alone; each with its seed."""

    name: str
    """Name of its folder in the run: `student`, `control`, and with a further seed `seeds/1/student`."""
    alpha: float
    seed: int

    @property
    def monitor(self) -> str:
        """The value to minimise: a control's own loss, since it never sees the teacher, else the held-out KL."""
        return "held_out_loss" if self.alpha == 1 else "held_out_kl"

    @property
    def is_control(self) -> bool:
        return self.name.rpartition("/")[2] == "control"

    def own(self, experiment: Experiment) -> Experiment:
        """Return the experiment with this role's seed.

        A control never sees rounds: it learns from the corpus alone, once, with the steps of all trainings.
        """
        train = replace(experiment.train, seed=self.seed)
        if experiment.rounds.count and self.is_control:
            times = experiment.rounds.count + 1
            steps = None if train.max_steps is None else train.max_steps * times
            train = replace(train, caches={}, begin_from=None, epochs=train.epochs * times, max_steps=steps)
        return replace(experiment, train=train)


def roles(experiment: Experiment) -> list[Role]:
    """Return all models that the experiment trains, in this order: its own seed first, then the further ones."""
    first = experiment.train.seed
    kinds = {"student": experiment.loss.alpha, **({"control": 1.0} if experiment.evaluate.control else {})}
    return [
        Role(kind if seed == first else f"seeds/{seed}/{kind}", alpha, seed)
        for seed in range(first, first + experiment.evaluate.seeds)
        for kind, alpha in kinds.items()
    ]


def rounding_of(experiment: Experiment) -> Rounding:
    """Return the rounding of the experiment's training, never `auto`."""
    train = experiment.train
    return choose_rounding(train.rounding, train.optimizer, train.precision)


# Settings that may change when a training is resumed: they change its speed, its memory or its logs, not its result.
_MAY_CHANGE = {
    *("resume", "caches", "begin_from", "dir", "num_workers", "log_every_steps", "loggers", "callbacks"),
    *("max_time", "checkpoint_every_steps", "keep_checkpoints", "texts_every_steps"),
    *("accelerator", "devices", "num_nodes", "strategy", "batch_size", "accumulate_grad_batches", "step_samples"),
    *("activation_checkpointing", "checkpoint_every_k", "offload_activations", "step_in_backward", "non_finite"),
}


def training_settings(experiment: Experiment, role: Role, samples: CacheReader | MixedReader) -> dict[str, Any]:
    """Return the settings that a trained model depends on. Other settings make another model."""
    from distill.cache.reading.mixture import MixedReader

    train, cache = experiment.train, samples.used
    found = {
        **own_settings(experiment, role),
        settings.NOT_COMPARED: {"callbacks": train.callbacks, "batch_size": train.batch_size},
        "samples_a_step": train.samples_of_step * train.devices * train.num_nodes,
        "cache": {key: value for key, value in asdict(cache).items() if key not in ("made_with", "shard_samples")},
    }
    if train.begin_from is not None:  # wherever it lies
        found["begins_with"] = settings.digest(Folders.of_training(train.begin_from).model("student"))
    if isinstance(samples, MixedReader):  # wherever the folders lie
        pairs = zip(samples.readers, samples.counts, strict=True)
        found["caches"] = {f"{place}": [reader.used.identity, count] for place, (reader, count) in enumerate(pairs)}
    return found


def _described(student: StudentConfig) -> dict[str, Any]:
    """Return the student's settings, with the defaults of options that were not given.

    A class of the user's own has the hash of its code too.
    """
    name = student.class_path
    unsaid = {key: value for key, value in plugins.defaults(name, "student").items() if key not in student.options}
    source = None if plugins.is_built_in(name, "student") else plugins.source_of(name, "student")
    return {**asdict(student), "defaults": unsaid, "source": source}


def own_settings(experiment: Experiment, role: Role) -> dict[str, Any]:
    """Return those of the `training_settings` that the experiment alone tells, without the cache and the devices."""
    loss = asdict(experiment.loss)
    del loss["alpha"], loss["chunk_size"]
    if ":" in experiment.loss.divergence:  # a function of the user's own
        loss["source"] = plugins.source_of(experiment.loss.divergence, "divergence")
    train = {**asdict(experiment.train), "rounding": rounding_of(experiment)}
    return {
        "student": _described(experiment.student),
        "teacher": experiment.teacher.model,
        "alpha": role.alpha,
        "loss": loss,
        "train": {key: value for key, value in train.items() if key not in _MAY_CHANGE},
    }
