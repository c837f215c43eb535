"""Every experiment file in configs/ is valid: keys, values, plug-ins and their options, without the network."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from distill import plugins
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.y*ml"))
OFFERED = {"vocab_size": 128, "sequence_length": 64, "teacher": "teacher", "model": "model", "device": "cpu"}


def load(file: str) -> Experiment:
    return load_experiment(str(ROOT / file), [])


def test_the_promised_files_are_there() -> None:
    assert {"configs/demo.yaml", "configs/llama-8b-to-1b-12gb.yaml"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_valid_down_to_the_options_of_its_plug_ins(file: str) -> None:
    experiment = load(file)
    plugins.arguments(experiment.student.class_path, "student", experiment.student.options, OFFERED)
    plugins.arguments(experiment.teacher.class_path, "teacher", experiment.teacher.options, OFFERED)


@pytest.mark.parametrize("file", FILES)
def test_a_file_says_what_it_is_for_and_where_it_leaves_things(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert yaml.safe_load(text)["run_dir"].startswith("runs/")  # which git ignores


@pytest.mark.parametrize("file", FILES)
def test_a_corpus_that_is_a_path_is_there(file: str) -> None:
    experiment = load(file)
    written = f"{experiment.run_dir}/written"  # which `distill generate` makes
    for path in {source.path for source in experiment.corpus.all_sources} - {written}:
        assert (ROOT / path).exists() or (path.count("/") == 1 and not (ROOT / path.split("/")[0]).exists())


@pytest.mark.parametrize("file", FILES)
def test_the_student_is_watched_and_measured_on_text_it_never_saw(file: str) -> None:
    experiment = load(file)
    assert experiment.corpus.held_out > 0 and experiment.cache.held_out_samples > 0


def test_the_demo_is_what_the_issue_asks_for() -> None:
    demo = load("configs/demo.yaml")
    assert (demo.teacher.model, demo.teacher.quantization) == ("smollm2-135m-demo", "nf4")
    assert (demo.student.class_path, demo.evaluate.control, demo.run_dir) == ("pruned", True, "runs/demo")
    assert demo.train.precision == "auto"  # bfloat16 where the processor is fast in it
    shards = -(-(demo.cache.max_samples or 0) // demo.cache.shard_samples)
    assert shards >= 4  # so that an interruption of the demo costs little
    steps = (demo.cache.max_samples or 0) // demo.train.batch_size
    assert demo.train.validate_every_steps < steps


def test_the_card_file_fits_its_promise() -> None:
    """NF4 teacher of 8 B and a student of 1.24 B whose weights, gradients and AdamW in bfloat16 take 8 bytes each."""
    card = load("configs/llama-8b-to-1b-12gb.yaml")
    assert (card.teacher.model, card.teacher.quantization) == ("meta-llama/Llama-3.1-8B", "nf4")
    assert (card.student.class_path, card.student.options) == ("huggingface", {"model": "meta-llama/Llama-3.2-1B"})
    assert card.train.precision == "bf16-true" and card.train.activation_checkpointing
    assert 1.24e9 * 8 < 12e9
    assert (card.corpus.path, card.corpus.name) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert card.corpus.sequence_length <= 8192 and card.corpus.shares_samples
    assert card.train.accelerator == "auto" and card.train.devices == 1
    tokens_a_step = card.train.batch_size * card.train.accumulate_grad_batches * card.corpus.sequence_length
    assert tokens_a_step >= 100_000  # the 1B student's own batches were of this order and more
    steps = (card.cache.max_samples or 0) // (card.train.batch_size * card.train.accumulate_grad_batches)
    assert steps > 5 * card.train.validate_every_steps
    assert card.train.schedule == "wsd" and card.train.learning_rate <= 5e-5  # a pretrained student


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_built_in_names_have_signatures_that_can_be_checked(kind: plugins.Kind) -> None:
    for name in plugins.BUILT_IN[kind]:
        parameters = inspect.signature(plugins.load(name, kind)).parameters.values()
        assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)
