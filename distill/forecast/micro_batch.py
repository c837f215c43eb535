"""The micro-batches that `auto` stands for on a card: the largest that the forecast finds room for."""

from __future__ import annotations

from bisect import bisect_left

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.micro_batch import Key, is_auto, sizes, with_recorded, with_size
from distill.forecast.advice import Forecasts
from distill.forecast.forecast import MARGIN_BYTES
from distill.forecast.phases.simulator import NoForecast, Phase
from distill.system.progress import say
from distill.system.units import size as in_words

PHASE_OF: dict[Key, Phase] = {"cache.batch_size": "cache-teacher", "train.batch_size": "train-student"}


def with_micro_batches(forecasts: Forecasts, experiment: Experiment, phases: tuple[Phase, ...]) -> Experiment:
    """Return the experiment with numbers in place of the `auto` of these phases: recorded ones, else the largest."""
    experiment = with_recorded(experiment)
    for key, phase in PHASE_OF.items():
        if phase in phases and is_auto(experiment, key):
            try:
                experiment = with_size(experiment, key, largest(forecasts, experiment, key))
            except NoForecast:  # which the phase's own forecast tells
                experiment = with_size(experiment, key, sizes(experiment, key, forecasts.card.is_cuda)[0])
    return experiment


def begin(forecasts: Forecasts, experiment: Experiment, key: Key) -> Experiment:
    """Return the experiment of a phase that begins, with the largest micro-batch in place of its `auto`, and say it.

    Raises UserError where several machines make one result together, each of which would choose by itself, and for a
    model of which there is no forecast.
    """
    try:
        size = largest(forecasts, experiment, key)
    except NoForecast as error:
        raise UserError(f"{key}: auto needs a forecast, and there is none: give a number ({error})") from None
    cache, train = experiment.cache, experiment.train
    shared = {
        "cache.batch_size": "cache.part" if cache.part else "cache.num_nodes" if cache.num_nodes > 1 else None,
        "train.batch_size": "train.num_nodes" if train.num_nodes > 1 else None,
    }[key]
    changed = with_size(experiment, key, size)
    passes = changed.train.accumulate_grad_batches
    if shared is not None:
        also = f" --train.accumulate_grad_batches {passes}" if key == "train.batch_size" else ""
        raise UserError(
            f"{key}: auto and {shared}: each machine would choose by itself, and they must agree: give all of them "
            f"one value; this machine would take --{key} {size}{also}"
        )
    told = f", {passes} {'pass' if passes == 1 else 'passes'} a step" if key == "train.batch_size" else ""
    needed = forecasts.needed_bytes(changed, PHASE_OF[key])
    say(f"{key}: auto takes {size}{told} ({in_words(needed)} of {in_words(forecasts.limit_bytes)}, by the forecast)")
    return changed


def largest(forecasts: Forecasts, experiment: Experiment, key: Key) -> int:
    """Return the largest size whose phase fits, with a margin on a card; the smallest if none does.

    Raises NoForecast for a model that cannot be simulated.
    """
    is_cuda = forecasts.card.is_cuda
    room = forecasts.limit_bytes - (MARGIN_BYTES if is_cuda else 0)
    rising = sizes(experiment, key, is_cuda)

    def is_too_large(size: int) -> bool:
        return forecasts.needed_bytes(with_size(experiment, key, size), PHASE_OF[key]) > room

    return rising[max(bisect_left(rising, True, key=is_too_large) - 1, 0)]
