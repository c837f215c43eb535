"""The experiment's cache: its expected manifest, and the finished cache to read from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.cache.format import token_order
from distill.cache.format.checks import printable
from distill.cache.format.folder import MANIFEST, Manifest, differences, read_journal, read_manifest
from distill.cache.format.manifest import MOST_SOURCES
from distill.cache.format.records import token_hash
from distill.cache.format.token_order import TokenOrder, token_counts
from distill.cache.reading.mixture import MixedReader, check_alike
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.storage import Storage, UrlStorage, is_url, open_storage
from distill.corpus import SampleSets
from distill.corpus.packing import Packing
from distill.corpus.sample_sets import READING, REVISION
from distill.corpus.splitting import spread
from distill.corpus.summary import left_out_in_words, together
from distill.corpus.templates import Learning
from distill.errors import UserError
from distill.experiment import settings
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.teacher import NOTHING_BEGUN, Begun, Teacher
from distill.system.progress import say
from distill.system.units import size
from distill.targets import schemes

HELD_OUT_ORDER = "held_out_order"
"""Fingerprint of caches whose held-out samples are spread over all held-out documents. Earlier ones hold the first."""


PACKING = "samples"
"""Fingerprint of caches whose documents become samples otherwise than in earlier releases, in words."""

MIXTURE = "mixture"
"""Fingerprint of caches whose corpus has several sources with weights."""
DATE = "date"
"""Fingerprint of caches whose chat template prints the day: the one that it takes for today."""


def make_scheme(experiment: Experiment, hidden_size: int) -> schemes.AnyScheme:
    """Make the scheme of the experiment's cache."""
    cache = experiment.cache
    parameters: dict[str, dict[str, Any]] = {
        "varopt": {"threshold": cache.threshold},
        "top_k": {"entries": cache.entries},
        "random": {"entries": cache.entries},
        "hidden": {"size": hidden_size},
    }
    return schemes.make(cache.scheme, **parameters[cache.scheme])


def with_budgeted_threshold(experiment: Experiment, found: Manifest) -> Experiment:
    """Return the experiment with the threshold that met its `cache.bytes_per_token` when `found` was made."""
    cache = experiment.cache
    if cache.bytes_per_token is None or found.made_with.get("bytes_per_token") != f"{cache.bytes_per_token:g}":
        return experiment
    threshold = found.scheme_parameters.get("threshold", cache.threshold)
    return replace(experiment, cache=replace(cache, threshold=threshold))


def make_token_order(experiment: Experiment, teacher: Teacher, samples: SampleSets) -> TokenOrder:
    """Make the order of the tokens in the experiment's cache: by their frequency in its first training shard.

    So it does not depend on how many samples there are.
    """
    count = min(len(samples.train), experiment.cache.shard_samples)
    return TokenOrder.by_frequency(token_counts(samples.train, count, teacher.vocab_size))


def packing_fingerprint(experiment: Experiment) -> str:
    """Return a text that determines the held-out documents, and the order in which the others are packed."""
    return f"held out {experiment.corpus.held_out}, seed {experiment.corpus.seed}"


def mixture_of(experiment: Experiment) -> dict[str, str]:
    """Return the fingerprint of the sources' weights, which determine the order of documents; none without weights."""
    weights = [f"{source.weight:g}" for source in experiment.corpus.all_sources if source.weight is not None]
    return {MIXTURE: f"weights {', '.join(weights)}"} if weights else {}


def make_manifest(experiment: Experiment, teacher: Teacher, samples: SampleSets, order: TokenOrder) -> Manifest:
    """Make the manifest that the experiment's cache must have."""
    corpus, cache = experiment.corpus, experiment.cache
    held_out = min(len(samples.held_out), cache.held_out_samples)
    train = len(samples.train) if cache.max_samples is None else min(len(samples.train), cache.max_samples)
    scheme = make_scheme(experiment, teacher.hidden_size)
    return Manifest(
        scheme=scheme.name,
        scheme_parameters=schemes.parameters(scheme),
        temperature=cache.temperature,
        seed=cache.seed,
        vocab_size=teacher.vocab_size,
        sequence_length=corpus.sequence_length,
        pack=samples.packing.shares,
        shard_samples=cache.shard_samples,
        splits={"held_out": held_out, "train": train},
        fingerprints={
            **teacher.fingerprints,
            "corpus": samples.fingerprint,
            **samples.rendering,
            **_packed(samples.packing),
            token_order.FINGERPRINT: order.fingerprint,
            "packing": packing_fingerprint(experiment),
            # The samples of a stream come from shuffled files, and there is no end to spread them up to.
            **({} if samples.gatherer else {HELD_OUT_ORDER: "spread"}),
            **mixture_of(experiment),
        },
        made_with={name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
        | {"batch_size": f"{cache.micro_batch}"}
        | ({"rows left out": left_out_in_words(left_out)} if (left_out := together(samples.counts).left_out) else {})
        | ({"bytes_per_token": f"{cache.bytes_per_token:g}"} if cache.bytes_per_token is not None else {})
        | ({"long_documents": samples.long_documents} if samples.long_documents else {}),
        sources=[printable(name) for name in samples.sources[:MOST_SOURCES]],
    )


def as_begun(manifest: Manifest, found: Manifest) -> Manifest:
    """Return the manifest without what a cache that was begun, `found`, did not say yet: it stays as it is.

    That is the held-out samples' order, and the day that a chat template prints.
    """
    unsaid = {name for name in (HELD_OUT_ORDER, DATE) if name not in found.fingerprints}
    kept = {name: value for name, value in manifest.fingerprints.items() if name not in unsaid}
    return replace(manifest, fingerprints=kept)


def packing_of(manifest: Manifest) -> Packing:
    """Return the packing of a cache. Raises UserError if this release does not know it."""
    return Packing.parse(manifest.fingerprints.get(PACKING, ""), manifest.pack)


def _packed(packing: Packing) -> dict[str, str]:
    return {PACKING: packing.words} if packing.words else {}


def as_packed(experiment: Experiment, packing: Packing | None) -> Experiment:
    """Return the experiment with the way of a cache's packing, if it leaves the way open."""
    if packing is None or experiment.corpus.pack != "auto":
        return experiment
    return replace(experiment, corpus=replace(experiment.corpus, pack=packing.way))


def begun_in(folders: Folders) -> Begun:
    """Return what a cache that was begun says of its text; nothing without one."""
    if not (folders.cache / MANIFEST).is_file():
        return NOTHING_BEGUN
    manifest = read_manifest(folders.cache)
    return _begun(manifest.fingerprints, manifest.pack)


def begun_for_run(folders: Folders) -> Begun:
    """Return what the cache of the run's student says of its text, wherever that cache is now."""
    student = folders.model("student")
    if (folders.cache / MANIFEST).is_file() or not (student / settings.FILE).is_file():
        return begun_in(folders)
    made_from = settings.read(student)["cache"]
    return _begun(made_from["fingerprints"], made_from["pack"])


def _begun(found: Mapping[str, str], pack: bool) -> Begun:
    packing = Packing.parse(found.get(PACKING, ""), pack)
    return Begun(found.get(DATE), packing, found.get("corpus"), READING in found, found.get(REVISION))


def check_tokens(folder: Path, manifest: Manifest, samples: SampleSets) -> None:
    """Raise UserError if a cache that was begun holds other tokens than the corpus gives now, by its first shard.

    A chat template may print the day, and a version of this program may learn other tokens of the same corpus.
    """
    found = read_manifest(folder)
    if found.version != manifest.version or differences(manifest, found):
        return  # the writer tells
    journal = read_journal(folder, found)
    shard = min((number for number, entry in journal.items() if entry.tokens and not entry.is_dropped), default=None)
    if shard is None:
        return
    numbers, places = sample_numbers(found, samples), found.shard_range(shard)
    split = "held_out" if places.start < found.splits["held_out"] else "train"
    start = 0 if split == "held_out" else found.splits["held_out"]
    sets = {"held_out": samples.held_out, "train": samples.train}
    here = [sets[split][numbers[split][place - start]] for place in places if place - start < len(sets[split])]
    if token_hash(map(_Tokens.of, here)) != journal[shard].tokens:
        raise UserError(
            f"cache {folder}: {journal[shard].file} holds other tokens than the corpus gives now: it was begun on "
            "another day with a chat template that prints it (give it as --corpus.date), or by another version of "
            "distill or of its libraries: finish it there, or make a new one with --cache.overwrite"
        )


@dataclass(frozen=True)
class _Tokens:
    """A sample of the corpus, as its hash is computed."""

    input_ids_L: np.ndarray
    position_ids_L: np.ndarray
    loss_mask_L: np.ndarray

    @classmethod
    def of(cls, sample: dict[str, Tensor]) -> _Tokens:
        return cls(*(sample[name].numpy() for name in ("input_ids", "position_ids", "loss_mask")))


def sample_numbers(manifest: Manifest, samples: SampleSets) -> dict[str, Sequence[int]]:
    """Return the samples of the corpus that a cache holds, in the cache's order, by split.

    Each number of held-out samples is the beginning of the same order, so that a cache can grow.
    """
    total = len(samples.held_out)
    held_out: Sequence[int] = spread(total).tolist() if HELD_OUT_ORDER in manifest.fingerprints else range(total)
    return {"held_out": held_out[: manifest.splits["held_out"]], "train": range(manifest.splits["train"])}


def open_training(experiment: Experiment) -> tuple[CacheReader | MixedReader, CacheReader]:
    """Open the training samples of the experiment's cache, or of all `train.caches`, and the held-out samples.

    Held-out samples are those of the first cache, which may weigh 0. Raises UserError for caches that cannot be learned
    together.
    """
    at_most = {"train": experiment.cache.max_samples, "held_out": experiment.cache.held_out_samples}
    named = experiment.train.caches
    for place, (name, weight) in enumerate(named.items()):
        if not weight and (place or len(named) == 1):
            raise UserError(
                f"train.caches: {name}: weighs 0, as only the first of several may, for its held-out samples"
            )
    storages = [_open(experiment, name) for name in named] or [open_cache(experiment)]
    held_out = CacheReader(storages[0], "held_out", at_most)
    weights = list(named.values()) or [1.0]
    readers = [
        CacheReader(storage, "train", at_most) for storage, weight in zip(storages, weights, strict=True) if weight
    ]
    for reader in readers:
        check_alike(held_out.manifest, reader.manifest, reader.storage.name, held_out.storage.name)
    train = MixedReader(readers, [weight for weight in weights if weight]) if len(readers) > 1 else readers[0]
    return train, held_out


def open_cache(experiment: Experiment) -> Storage:
    """Open the finished cache to read from: the folder that was made, or a URL."""
    cache = experiment.cache
    return _open(experiment, cache.dir if cache.dir and is_url(cache.dir) else Folders.of(experiment).cache)


def _open(experiment: Experiment, location: str | Path) -> Storage:
    cache = experiment.cache
    storage = open_storage(location, local_copy_bytes=int(cache.local_copy_gb * 1e9))
    if isinstance(storage, UrlStorage) and storage.bytes > storage.limit:
        say(
            f"cache {storage.name}: {size(storage.bytes)}, more than the local copies may take "
            "(cache.local_copy_gb): its shards will be fetched many times, as samples are read in random order"
        )
    return storage


def check_cache_settings(experiment: Experiment, found: Manifest, folder: str) -> None:
    """Raise UserError if the experiment asks for a cache other than `found`, as far as its own settings tell."""
    experiment = with_budgeted_threshold(experiment, found)
    scheme = make_scheme(experiment, found.scheme_parameters.get("size", 0))
    corpus, asked = experiment.corpus, dict(found.fingerprints)
    if "conversations" in asked:
        asked["conversations"] = Learning(corpus.learn, corpus.thoughts == "keep").words
    asked = {name: value for name, value in asked.items() if name != MIXTURE} | mixture_of(experiment)
    if DATE in asked and corpus.date is not None:
        asked[DATE] = corpus.date
    packing = packing_of(found).asked(corpus.pack, corpus.long)
    asked = {key: value for key, value in asked.items() if key != PACKING} | _packed(packing)
    expected = replace(
        found,
        fingerprints=asked,
        scheme=scheme.name,
        scheme_parameters=schemes.parameters(scheme),
        temperature=experiment.cache.temperature,
        seed=experiment.cache.seed,
        sequence_length=corpus.sequence_length,
        pack=packing.shares,
    )
    different = differences(expected, found)
    if different:
        raise UserError(
            f"cache {folder} was made with other settings ({'; '.join(different)}): "
            "give the settings it was made with, or point --cache.dir elsewhere"
        )
