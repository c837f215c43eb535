"""Checkpoints that an experiment still fetches from the hub, and the making of a quantised copy: bytes and time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from distill import plugins
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.forecast.phases.simulator import Phase
from distill.forecast.published import Published, published_models
from distill.models import checkpoints
from distill.models.quantized_manifest import is_finished
from distill.system.units import duration, size

BYTES_A_SECOND = 12.5e6
"""Pace of a download for its note: 100 Mbit/s."""
QUANTIZED_BYTES_A_SECOND = 70e6
"""Bytes of a checkpoint in 16 bits that one core reads and packs in a second: 3.31 GB in 47 s
(tests/benchmarks/large_teacher.py)."""
_BYTES = {"mxfp4": 4.25 / 8, "fp8": 1.0}
"""Bytes a parameter of checkpoints that are published in few bits; all others have two."""


def models_to_come(
    experiment: Experiment, phases: Collection[Phase], copied: Mapping[str, int] | None, notes: list[str]
) -> dict[str, int]:
    """Return the bytes of checkpoints and of the teacher's quantised copy, and note the time of both.

    `copied`: sizes of a teacher that is streamed from such a copy.
    """
    disk, fetching, parameters = dict[str, int](), fetched(experiment, phases), 0
    if fetching:
        disk["fetched models"] = sum(fetching.values())
    if copied is not None:
        disk["quantised teacher"] = copied["copy_bytes"]
        if not is_finished(copy_folder(experiment)):
            parameters = copied["parameters"] + copied["packed_parameters"]
    notes += notes_of(fetching, 2 * parameters)
    return disk


def copy_folder(experiment: Experiment) -> Path:
    """Return the folder of a streamed teacher's quantised copy."""
    named = experiment.teacher.options.get("quantized_copy")
    return Path(named or Folders.of(experiment).quantized_teacher).expanduser()


def fetched(experiment: Experiment, phases: Collection[Phase]) -> dict[str, int]:
    """Return the bytes of each published checkpoint that these phases need and this machine lacks, by its hub name."""
    teacher, student, names = experiment.teacher, experiment.student, dict[str, str | None]()
    if {"cache-teacher", "evaluate"} & set(phases):
        names[teacher.model] = teacher.revision
    option = plugins.declared(student.class_path, "student", "pretrained")
    if "train-student" in phases and option is not None and student.options.get(option) is not None:
        names.setdefault(str(student.options[option]), None)
    found = {}
    for name, revision in names.items():
        facts = published_models().get(name)
        if facts is None or Path(name).expanduser().exists():
            continue
        here = checkpoints.kept(name, revision)
        if here is None or not checkpoints.has_weights(here):
            found[name] = max(_bytes_of(facts) - _begun(name), 0)
    return found


def notes_of(fetching: dict[str, int], copied_bytes: int) -> list[str]:
    """Return notes on the time that the fetching takes, and the packing of so many bytes into a quantised copy."""
    notes = []
    if fetching:
        told, total = ", ".join(f"{name} {size(count)}" for name, count in fetching.items()), sum(fetching.values())
        notes.append(f"fetched from the hub: {told}; about {duration(total / BYTES_A_SECOND)} at 100 Mbit/s")
    if copied_bytes:
        notes.append(
            "teacher: its quantised copy is made once, at the first start, in about "
            f"{duration(copied_bytes / QUANTIZED_BYTES_A_SECOND)} of one core"
        )
    return notes


def _bytes_of(facts: Published) -> int:
    """Return the size of a published checkpoint. Of one in few bits, embedding and head have 16 still."""
    config = facts.config
    method = config.get("quantization_config", {}).get("quant_method")
    rows = 0 if method is None else config["vocab_size"] * config["hidden_size"] * 2
    return round((facts.parameters - rows) * _BYTES.get(str(method), 2.0) + 2 * rows)


def _begun(name: str) -> int:
    """Return the bytes of a checkpoint that an earlier, stopped download left."""
    blobs = hub_cache() / f"models--{name.replace('/', '--')}" / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*") if path.is_file())


def hub_cache() -> Path:
    """Return the folder in which the hub's library keeps what it fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
