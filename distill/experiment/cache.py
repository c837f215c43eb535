"""The experiment's cache: its expected manifest, and the finished cache to read from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill.cache.format import token_order
from distill.cache.format.checks import printable
from distill.cache.format.folder import Manifest, differences
from distill.cache.format.manifest import MOST_SOURCES
from distill.cache.format.token_order import TokenOrder, token_counts
from distill.cache.reading.storage import Storage, UrlStorage, is_url, open_storage
from distill.corpus import SampleSets
from distill.corpus.splitting import spread
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.teacher import Teacher
from distill.system.progress import say
from distill.system.units import size
from distill.targets import schemes

HELD_OUT_ORDER = "held_out_order"
"""Fingerprint of caches whose held-out samples are spread over all held-out documents. Earlier ones hold the first."""


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
        pack=corpus.pack,
        shard_samples=cache.shard_samples,
        splits={"held_out": held_out, "train": train},
        fingerprints={
            **teacher.fingerprints,
            "corpus": samples.fingerprint,
            token_order.FINGERPRINT: order.fingerprint,
            "packing": packing_fingerprint(experiment),
            HELD_OUT_ORDER: "spread",
        },
        made_with={name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
        | ({"bytes_per_token": f"{cache.bytes_per_token:g}"} if cache.bytes_per_token is not None else {}),
        sources=[printable(name) for name in samples.sources[:MOST_SOURCES]],
    )


def with_order_of(manifest: Manifest, found: Manifest) -> Manifest:
    """Return the manifest with the held-out samples' order of a cache that was begun, `found`, and stays as it is."""
    if HELD_OUT_ORDER in found.fingerprints:
        return manifest
    kept = {name: value for name, value in manifest.fingerprints.items() if name != HELD_OUT_ORDER}
    return replace(manifest, fingerprints=kept)


def sample_numbers(manifest: Manifest, samples: SampleSets) -> dict[str, Sequence[int]]:
    """Return the samples of the corpus that a cache holds, in the cache's order, by split.

    Each number of held-out samples is the beginning of the same order, so that a cache can grow.
    """
    total = len(samples.held_out)
    held_out: Sequence[int] = spread(total).tolist() if HELD_OUT_ORDER in manifest.fingerprints else range(total)
    return {"held_out": held_out[: manifest.splits["held_out"]], "train": range(manifest.splits["train"])}


def open_cache(experiment: Experiment) -> Storage:
    """Open the finished cache to read from: the folder that was made, or a URL."""
    cache = experiment.cache
    location = cache.dir if cache.dir and is_url(cache.dir) else Folders.of(experiment).cache
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
    expected = replace(
        found,
        scheme=scheme.name,
        scheme_parameters=schemes.parameters(scheme),
        temperature=experiment.cache.temperature,
        seed=experiment.cache.seed,
        sequence_length=experiment.corpus.sequence_length,
        pack=experiment.corpus.pack,
    )
    different = differences(expected, found)
    if different:
        raise UserError(
            f"cache {folder} was made with other settings ({'; '.join(different)}): "
            "give the settings it was made with, or point --cache.dir elsewhere"
        )
