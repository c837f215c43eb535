"""The budgets of a cache, `cache.bytes_per_token` and `cache.max_size`, met before it is begun."""

from __future__ import annotations

from dataclasses import replace

from distill.cache.format.folder import Manifest
from distill.cache.format.token_order import TokenOrder
from distill.corpus import SampleSets
from distill.errors import UserError
from distill.experiment.cache import make_manifest, with_budgeted_threshold
from distill.experiment.configuration import Experiment
from distill.experiment.teacher import Teacher
from distill.system import units
from distill.system.progress import say
from distill.system.units import parse_size
from distill.targets.schemes import VarOpt


def check_budget_options(experiment: Experiment) -> None:
    """Raise UserError for a budget that is no size, or that several processes would each meet in their own way."""
    cache = experiment.cache
    if cache.max_size is not None:
        parse_size(cache.max_size, "cache.max_size")
    if cache.bytes_per_token is None:
        return
    if cache.scheme != "varopt":
        raise UserError(f"cache.bytes_per_token: it chooses varopt's threshold; scheme {cache.scheme} has none")
    if cache.part or cache.devices * cache.num_nodes > 1:
        raise UserError(
            "cache.bytes_per_token: parts and processes must share one threshold: let one process choose it on a few "
            "samples (--cache.max_samples 8, without --cache.part), then give it as --cache.threshold"
        )


def within_budget(
    experiment: Experiment, found: Manifest | None, teacher: Teacher, samples: SampleSets, order: TokenOrder
) -> Experiment:
    """Return the experiment with the threshold of its budget. Raises UserError if the cache would be too large.

    An earlier start's choice stays: the first samples are measured only when the cache is begun. `found` is the
    manifest of one that was.
    """
    cache = experiment.cache
    if found is not None or (cache.bytes_per_token is None and cache.max_size is None):
        return experiment if found is None else with_budgeted_threshold(experiment, found)
    # Imported here, because these take seconds that a cache without a budget does not need.
    from distill.cache.making.budget import SizeProbe
    from distill.cache.making.predict import TeacherModule

    manifest = make_manifest(experiment, teacher, samples, order)
    module = TeacherModule.of_cache(teacher.load(), manifest, cache.chunk_size)
    probe = SizeProbe(module, order, samples.train, manifest.splits["train"], cache.micro_batch, teacher.device)
    scheme = manifest.make_scheme()
    if cache.bytes_per_token is not None:
        assert isinstance(scheme, VarOpt)
        scheme = probe.threshold_for(cache.bytes_per_token, scheme)
        say(f"cache: threshold {scheme.threshold:g} takes about {cache.bytes_per_token:g} bytes a token")
        experiment = replace(experiment, cache=replace(cache, threshold=scheme.threshold))
    if cache.max_size is not None:
        size = probe.check_size(scheme, manifest, cache.max_size)
        tokens = manifest.samples * manifest.sequence_length
        say(f"cache: forecast {units.size(size * tokens)}, {size:.1f} bytes for each of {tokens:,} tokens")
    return experiment
