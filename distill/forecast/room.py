"""Room on the disks for all that an experiment still writes: its cache, checkpoints and finished models."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets

from distill.cache.format.folder import MANIFEST, read_journal, read_manifest
from distill.cache.format.head import HEAD
from distill.cache.format.part import Part
from distill.cache.reading.storage import is_url
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.generation import folder_of
from distill.experiment.roles import roles
from distill.forecast.fetched import copy_folder, hub_cache
from distill.system.units import parse_size, size


@dataclass(frozen=True)
class Need:
    """Bytes that are still to be written into a folder."""

    what: str
    folder: Path
    bytes: int


def needs(experiment: Experiment, disk: Mapping[str, int | None], train_samples: int | None) -> list[Need]:
    """Return the needs of an experiment: the amounts of `Forecast.disk`, less what lies in its folders already.

    The checkpoints of a finished model count as written, whatever became of them. A part of a cache is trained on
    elsewhere, so its needs are its shards alone.
    """
    folders, found = Folders.of(experiment), []
    if not (experiment.cache.dir and is_url(experiment.cache.dir)):
        found += list(_of_cache(experiment, folders.cache, disk, train_samples))
    if copy := disk.get("quantised teacher"):
        folder = copy_folder(experiment)
        found.append(Need("the quantised teacher", folder, copy - _bytes_in(folder)))
    if fetching := disk.get("fetched models"):
        found.append(Need("models of the hub", hub_cache(), fetching))
    if disk.get("written"):
        found.append(Need("texts", folder_of(experiment), disk["written"] or 0))
    if disk.get("rounds"):
        folder = folders.run / "rounds"
        found.append(Need("rounds", folder, (disk["rounds"] or 0) - _bytes_below(folder)))
    count = len(roles(experiment))
    for role in roles(experiment) if experiment.cache.part is None else []:
        if folders.model(role.name).exists():
            continue
        checkpoints, model = folders.checkpoints(role.name), folders.model(role.name)
        left = (disk.get("checkpoints") or 0) // count - _bytes_in(checkpoints)
        found.append(Need(f"checkpoints of the {role.name}", checkpoints, left))
        found.append(Need(role.name, model, (disk.get("student") or 0) // count))
    found.append(Need("tables of the corpus", Path(datasets.config.HF_DATASETS_CACHE), disk.get("corpus") or 0))
    return [need for need in found if need.bytes > 0]


def _of_cache(
    experiment: Experiment, folder: Path, disk: Mapping[str, int | None], train_samples: int | None
) -> Iterator[Need]:
    """Yield the cache's needs: shards, the side files of those in flight, and the head of hidden states."""
    config, total = experiment.cache, disk.get("cache")
    if total is None:
        return
    if config.max_size is not None:
        total = min(total, parse_size(config.max_size, "cache.max_size"))
    shards = max(1, -(-(train_samples or 1) // config.shard_samples))
    written, is_whole = 0, False
    if (folder / MANIFEST).is_file() and not config.overwrite:
        manifest = read_manifest(folder)
        entries = read_journal(folder, manifest).values()
        written, is_whole = sum(entry.bytes for entry in entries), len(entries) >= manifest.shards
        is_whole = is_whole and (train_samples or 0) <= manifest.samples
    share = 1 if config.part is None else Part.parse(config.part).count
    in_flight = min(config.devices * config.num_nodes, shards) * total // shards
    if not is_whole:
        yield Need("cache", folder, total // share - written + min(in_flight, total // share))
    if not (folder / HEAD).exists():
        yield Need("the teacher's head", folder, disk.get("head") or 0)


def shortages(needs: list[Need]) -> list[str]:
    """Return a line for each disk that lacks room: its folders, the bytes needed and free. Folders on one add up."""
    disks: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        disks[nearest(need.folder).stat().st_dev].append(need)
    return [
        f"disk of {found[0].folder}: {size(total)} are needed "
        f"({', '.join(f'{need.what} {size(need.bytes)}' for need in found)}), {size(free)} are free"
        for found in disks.values()
        if (total := sum(need.bytes for need in found)) > (free := free_bytes(found[0].folder))
    ]


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk where `folder` is, or would be."""
    return shutil.disk_usage(nearest(folder)).free


def nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
