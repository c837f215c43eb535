"""Distillation of a large language model on one small card: cache the teacher once, then train the student."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False  # which a type checker takes for true; `typing` itself would cost `distill --help` time
if TYPE_CHECKING:
    from typing import Any

    from distill.api import cache_teacher as cache_teacher
    from distill.api import evaluate as evaluate
    from distill.api import generate as generate
    from distill.api import load_experiment as load_experiment
    from distill.api import load_student as load_student
    from distill.api import plan as plan
    from distill.api import preview as preview
    from distill.api import run as run
    from distill.api import train_student as train_student
    from distill.cache.reading.batches import Batch as Batch
    from distill.cache.reading.reader import CacheReader as CacheReader
    from distill.errors import UserError as UserError
    from distill.experiment.configuration import Experiment as Experiment
    from distill.losses import divergences as divergences
    from distill.losses.chunks import ChunkTarget as ChunkTarget
    from distill.losses.fused import fused_loss as fused_loss
    from distill.models.huggingface import HuggingFaceLanguageModel as HuggingFaceLanguageModel
    from distill.models.language_model import Head as Head
    from distill.report.frames import Results as Results
    from distill.training.chunk_target import chunk_target as chunk_target

_PLACES = {
    "Batch": "distill.cache.reading.batches",
    "CacheReader": "distill.cache.reading.reader",
    "ChunkTarget": "distill.losses.chunks",
    "Experiment": "distill.experiment.configuration",
    "Head": "distill.models.language_model",
    "HuggingFaceLanguageModel": "distill.models.huggingface",
    "Results": "distill.report.frames",
    "UserError": "distill.errors",
    "cache_teacher": "distill.api",
    "chunk_target": "distill.training.chunk_target",
    "divergences": "distill.losses",
    "evaluate": "distill.api",
    "fused_loss": "distill.losses.fused",
    "generate": "distill.api",
    "load_experiment": "distill.api",
    "load_student": "distill.api",
    "plan": "distill.api",
    "preview": "distill.api",
    "run": "distill.api",
    "train_student": "distill.api",
}
"""The public names, and the modules that they are imported from when they are first used. The names stay."""

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'distill' has no attribute '{name}'")
    module = importlib.import_module(_PLACES[name])
    value = globals()[name] = getattr(module, name, None) or importlib.import_module(f"{_PLACES[name]}.{name}")
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
