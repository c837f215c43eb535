"""Every experiment file whose name ends in a card or its size fits on such a card with 0.7 GB to spare."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from distill.experiment.file import load_experiment
from distill.forecast.forecast import Forecaster
from distill.forecast.machine.cards import find_card
from distill.forecast.phases.simulator import PHASES
from distill.forecast.sizes import amount_of, corpus_work
from distill.forecast.writing import is_asked, written_tokens

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted([*CONFIGS.glob("*-*gb.yaml"), *CONFIGS.glob("*-t4.yaml")])
SPARE = 0.7e9


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    """One for all cards: what is used does not depend on how much there is, and what two files share is made once."""
    return Forecaster(find_card("24GiB"))


def test_there_is_one_for_each_size() -> None:
    assert {file.stem.rpartition("-")[2] for file in FILES} == {"6gb", "8gb", "12gb", "16gb", "24gb", "t4"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_for_a_card_fits_it(file: Path, forecaster: Forecaster, one_thread: None) -> None:
    began = time.monotonic()
    card = find_card(file.stem.rpartition("-")[2])
    experiment = load_experiment(str(file), [])
    if not card.has_bf16:
        assert "bf" not in f"{experiment.teacher.compute_dtype} {experiment.train.precision}"
    for phase in PHASES:
        needed = forecaster.needed_bytes(experiment, phase)
        print(f"{phase}: {needed / 1e9:.2f} GB, {(card.memory_bytes - needed) / 1e9:.2f} GB to spare")
        assert card.memory_bytes - needed >= SPARE, phase
    if is_asked(experiment):  # its corpus is written here first
        assert written_tokens(experiment, str(experiment.corpus.path)) is not None
        return
    work = corpus_work(experiment, amount_of(experiment, []))
    assert work is not None and work.is_fetched and experiment.cache.max_samples is not None
    wanted = experiment.cache.max_samples * experiment.corpus.sequence_length
    assert wanted <= work.tokens < 1.5 * wanted, "no more of the data set is read than is needed"
    print(f"{time.monotonic() - began:.0f} s; corpus: {work.described()}")
