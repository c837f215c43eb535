"""Experiment files: what they give, and one line for every mistake in them."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path

import pytest
import yaml

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment, print_options, to_dict
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig
from distill.experiment.values import limits_of

MINIMAL = {"corpus": {"path": "c.jsonl"}, "teacher": {"model": "t"}}


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    return write(tmp_path, yaml.safe_dump(MINIMAL))


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "demo.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_experiment(path, list(overrides))
    assert len(str(caught.value).splitlines()) == 1
    assert "<class" not in str(caught.value) and "typing." not in str(caught.value)
    return str(caught.value)


def test_what_the_file_leaves_out_has_its_default(minimal: str) -> None:
    experiment = load_experiment(minimal, [])
    assert experiment.corpus.path == "c.jsonl" and experiment.teacher.model == "t"
    assert (experiment.cache.threshold, experiment.cache.scheme, experiment.loss.alpha) == (0.02, "varopt", 0.0)
    assert experiment.run_dir == Experiment.run_dir


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump({**MINIMAL, "cache": {"threshold": 0.1}, "run_dir": "a"}))
    overrides = ["--cache.threshold", "0.01", "--run_dir=b", "--train.precision", "bf16-true", "--teacher.model", "u"]
    experiment = load_experiment(path, overrides)
    assert (experiment.cache.threshold, experiment.run_dir, experiment.train.precision) == (0.01, "b", "bf16-true")
    assert experiment.teacher.model == "u" and experiment.corpus.path == "c.jsonl"


def test_a_required_key_may_come_from_the_command_line_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "teacher: {model: t}\n")
    assert load_experiment(path, ["--corpus.path", "x"]).corpus.path == "x"
    assert "corpus.path" in refusal(path)


def test_options_of_a_plug_in_are_free_and_keep_their_types(tmp_path: Path) -> None:
    student = {"class_path": "compact", "options": {"layers": 3, "sizes": [1, 2], "inner": {"a": None}, "rate": 1e-3}}
    path = write(tmp_path, yaml.safe_dump({**MINIMAL, "student": student}))
    assert load_experiment(path, []).student.options == student["options"]
    replaced = load_experiment(path, ["--student.options", "{size: 64, layers: 2}"])
    assert replaced.student.options == {"size": 64, "layers": 2}
    one = load_experiment(path, ["--student.options.layers", "4"]).student.options
    assert one["layers"] in (4, "4") and one["sizes"] == [1, 2]


def test_numbers_written_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text, and 1 is no float to a strict reader."""
    path = write(tmp_path, "corpus: {path: c}\nteacher: {model: t}\ntrain: {learning_rate: 1e-3, weight_decay: 1}\n")
    train = load_experiment(path, ["--train.beta1", "9e-1"]).train
    assert (train.learning_rate, train.weight_decay, train.beta1) == (1e-3, 1.0, 0.9)
    assert isinstance(train.learning_rate, float)


def test_names_that_look_like_numbers_and_dates_stay_as_they_are(tmp_path: Path) -> None:
    text = "corpus: {path: 2026-1-1 1:00:00}\nteacher: {model: 1e3, revision: 12e4567}\nrun_dir: 2026-11-30T10:00:00Z\n"
    experiment = load_experiment(write(tmp_path, text), [])
    assert experiment.corpus.path == "2026-1-1 1:00:00" and experiment.run_dir == "2026-11-30T10:00:00Z"
    assert (experiment.teacher.model, experiment.teacher.revision) == ("1e3", "12e4567")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache.max_size", "20"),
        ("cache.max_size", "9" * 400 + "GB"),
        ("cache.max_time", "soon"),
        ("cache.part", "0/3"),
        ("train.max_time", "9" * 5000 + "d"),
        ("memory_limit", "12 gigs"),
    ],
)
def test_sizes_times_and_parts_are_refused_with_the_file(minimal: str, key: str, value: str) -> None:
    assert refusal(minimal, f"--{key}", value).startswith(f"{key}: '{value}'")


def test_to_dict_gives_back_an_equal_experiment(tmp_path: Path, minimal: str) -> None:
    experiment = load_experiment(minimal, ["--student.options", "{layers: 2}"])
    assert load_experiment(write(tmp_path, yaml.safe_dump(to_dict(experiment))), []) == experiment


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("corpus: {path: c\n", ["demo.yaml: not valid YAML: line 2, column 1: expected ',' or '}'"]),
        ("a: b: c\n", ["not valid YAML: line 1, column 5"]),
        ("- a\n- b\n", ["an experiment file is a mapping"]),
        ("", ["an experiment file is a mapping"]),
        (b"corpus: \xff\xfe\n", ["cannot be read", "save it as UTF-8"]),
        ("corpus: {path: !!binary aGVsbG8=}\n", ["line 1: binary is no plain value"]),
        ("evaluate: {tasks: !!set {a}}\n", ["line 1: set is no plain value"]),
        ("train: {epochs: !!int 3.0}\n", ["not valid YAML: ", "3.0"]),
        ('corpus: {path: "\\ud83d"}\n', ["line 1: ", "half of a character"]),
        ('"a\\nb": 1\n', ["'a\\nb': unknown key"]),
        ('corpus: {path: c, name: "null"}\n', ["corpus.name: is the text 'null'", "leave the key out"]),
        (
            "corpus: {path: c}\nteacher: {model: t}\ntrain: {max_steps: 1.5}\n",
            ["max_steps: expected int. Got value: 1.5"],
        ),
        ("corpsu: {path: c}\n", ["corpsu: unknown key", "did you mean 'corpus'?"]),
        ("teacher: {quantisation: nf4}\n", ["teacher.quantisation: unknown key", "did you mean 'quantization'?"]),
        ("teacher: {zzz: 1}\n", ["teacher.zzz: unknown key", "known: class_path, compute_dtype, model"]),
        ("teacher: [nf4]\n", ["teacher: must be a mapping"]),
        ("cache:\n", ["cache: must be a mapping"]),
        ("teacher: {model: t, quantization: nf5}\n", ["teacher.quantization", "nf5", "'nf4', 'int8', 'none'"]),
        ("train: {epochs: many}\n", ["train.epochs", "many", "int"]),
        ("train: {epochs: 1.5}\n", ["train.epochs", "1.5", "int"]),
        ("train: {learning_rate: fast}\n", ["train.learning_rate", "fast", "float"]),
        (
            "corpus: {path: c, pack: perhaps}\n",
            ["corpus.pack: expected one of 'auto', 'documents'", "true or false", "perhaps"],
        ),
        ("student: {options: 3}\n", ["student.options", "3"]),
        ("corpus: {seed: 1}\nteacher: {model: t}\n", ["corpus.path: is missing", "corpus.sources"]),
        (
            "corpus: {path: c, sources: [{path: d}]}\nteacher: {model: t}\n",
            ["corpus.path: stands beside corpus.sources"],
        ),
        (
            "corpus: {sources: [{path: d}], split: test}\nteacher: {model: t}\n",
            ["corpus.split: stands beside corpus.sources"],
        ),
        ("corpus: {sources: [{path: d, wieght: 2}]}\n", ["corpus.sources[1].wieght: unknown", "'weight'"]),
        ("corpus: {sources: [{path: d}, e]}\n", ["corpus.sources[2]: must be a mapping, got 'e'"]),
        ("corpus: {sources: {path: d}}\n", ["corpus.sources: must be a list"]),
        ("corpus: {sources: [{path: d, limit: 0}]}\nteacher: {model: t}\n", ["corpus.sources[1].limit: 0 is not"]),
        ("corpus: {sources: [{path: d, weight: x}]}\nteacher: {model: t}\n", ["weight", "x"]),
        ("corpus: {sources: [{weight: 2}]}\nteacher: {model: t}\n", ["corpus.sources", "path"]),
        ("corpus: {path: c, text_field: body}\n", ["corpus.text_field", "gone", "corpus.columns: {text: NAME}"]),
        ("corpus: {path: c, messages_field: m}\n", ["corpus.messages_field", "corpus.columns: {messages: NAME}"]),
        ("1: 2\n", ["1: unknown key"]),
    ],
    ids=lambda value: repr(value) if isinstance(value, (str, bytes)) else "",
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    message = refusal(write(tmp_path, text))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--teacher.quantisation", "nf4"], ["--teacher.quantisation: unknown option", "did you mean 'quantization'?"]),
        (["--tarin.epochs", "2"], ["--tarin: unknown option", "did you mean 'train'?"]),
        (["--seed", "2"], ["--seed: unknown option", "--corpus.seed or --cache.seed or --train.seed"]),
        (["--experiment_file", "other.yaml"], ["--experiment_file: unknown option"]),
        (["--train.epochs", "many"], ["train.epochs", "many", "int"]),
        (["--train.epochs"], ["epochs"]),
        (["--train.precision", "fp8"], ["train.precision", "fp8", "'bf16-mixed'"]),
        (["--train.epochs.more", "1"], ["--train.epochs.more: unknown option", "train.epochs is a value"]),
        (["--run_dir.more", "1"], ["--run_dir.more: unknown option", "run_dir is a value"]),
        (["more.yaml"], ["more.yaml"]),
        (["-x", "1"], ["-x"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_a_mistake_in_an_override_is_one_line(minimal: str, overrides: list[str], words: list[str]) -> None:
    message = refusal(minimal, *overrides)
    assert all(word in message for word in words), message


def test_a_missing_file_names_the_nearest(tmp_path: Path, minimal: str) -> None:
    assert f"did you mean '{minimal}'?" in refusal(str(tmp_path / "demmo.yaml"))
    assert "no such experiment file" in refusal(str(tmp_path / "nowhere" / "demo.yaml"))
    assert "cannot be read" in refusal(str(tmp_path))


def test_all_values_out_of_range_are_named_at_once(minimal: str) -> None:
    message = refusal(minimal, "--loss.alpha", "1.5", "--corpus.held_out", "0.7", "--train.epochs", "0")
    assert "loss.alpha: 1.5 is not between 0 and 1" in message
    assert "corpus.held_out: 0.7 is not between 0 and 0.5" in message
    assert "train.epochs: 0 is not between 1 and" in message


def test_not_a_number_is_in_no_range(minimal: str) -> None:
    assert "train.learning_rate: nan is not between" in refusal(minimal, "--train.learning_rate", ".nan")


def has_numbers(hint: object) -> bool:
    return hint in (int, float) or any(has_numbers(inner) for inner in typing.get_args(hint))


def test_every_number_of_the_file_has_limits() -> None:
    """A number without limits would be taken as it comes: a batch of 0, a threshold of -1."""
    limits = {
        f"{section}.{name}": limits_of(hint)
        for section, kind in typing.get_type_hints(Experiment).items()
        if dataclasses.is_dataclass(kind)
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        if has_numbers(hint)
    }
    assert len(limits) > 40
    assert not {name for name, found in limits.items() if found is None}
    experiment = Experiment(CorpusConfig("c"), TeacherConfig("t"))
    for name, found in limits.items():
        section, key = name.split(".")
        default = getattr(getattr(experiment, section), key)
        for number in (
            default.values() if isinstance(default, dict) else default if isinstance(default, list) else [default]
        ):
            assert found is None or number is None or found.low <= number <= found.high


def test_numbers_in_a_list_have_limits_too(minimal: str) -> None:
    message = refusal(minimal, "--evaluate.cost_batch_sizes", "[1, 0]")
    assert message == "evaluate.cost_batch_sizes: 0 is not between 1 and 65536"
    assert "int" in refusal(minimal, "--evaluate.cost_batch_sizes", "[1, many]")


def test_options_are_printed_with_their_limits(capsys: pytest.CaptureFixture[str]) -> None:
    print_options()
    printed = capsys.readouterr().out
    assert "--loss.alpha  (float between 0 and 1; default 0.0)" in printed
    assert "--train.max_steps  (int | None between 1 and 1e+09; default None)" in printed
    assert "Annotated" not in printed


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
def test_pipes_and_devices_are_no_experiment_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (str(tmp_path / "pipe.yaml"), "/dev/zero", str(tmp_path)):
        assert path in refusal(path)
    assert "longer than" in refusal(write(tmp_path, " " * 2**21))
    assert "nested too deeply" in refusal(write(tmp_path, "[" * 9**5))


KEYS = [
    (section, name, hint)
    for section, kind in typing.get_type_hints(Experiment).items()
    for name, hint in (typing.get_type_hints(kind).items() if dataclasses.is_dataclass(kind) else [("", kind)])
]


@pytest.mark.parametrize(("section", "name", "hint"), KEYS, ids=lambda value: value if isinstance(value, str) else "")
def test_only_a_key_whose_type_says_so_may_have_no_value(tmp_path: Path, section: str, name: str, hint: object) -> None:
    content: dict[str, typing.Any] = {key: dict(value) for key, value in MINIMAL.items()}
    key = f"{section}.{name}" if name else section
    if name:
        content.setdefault(section, {})[name] = None
    else:
        content[section] = None
    path = write(tmp_path, yaml.safe_dump(content))
    if key == "corpus.path":
        assert "corpus.path: is missing" in refusal(path)
    elif type(None) in typing.get_args(hint):
        load_experiment(path, [])
    else:
        assert f"{key}: has no value" in refusal(path)
        if hint is not str:  # which may be the text null
            assert key in refusal(write(tmp_path, yaml.safe_dump(MINIMAL)), f"--{key}", "null")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {seed: 1}\ntrain: {epochs: 2}\n", "line 4: train stands there twice, first in line 3"),
        ("train:\n  epochs: 1\n  epochs: 1\n", "line 5: epochs stands there twice, first in line 4"),
        ("student: {options: {a: 1, a: 2}}\n", "line 3: a stands there twice"),
        ("student: {options: {a: [{b: 1, b: 2}]}}\n", "line 3: b stands there twice"),
        ("student: {options: &x {a: *x}}\n", "line 3: refers to itself"),
        (
            "student: {options: {a: &a [" + "1," * 50 + "], b: &b [" + "*a," * 50 + "], c: [" + "*b," * 50 + "]}}\n",
            "more than 100,000 values",
        ),
        ("train: {epochs: 010}\n", "line 3: YAML reads 010 in base 8 or 60"),
        ("train: {epochs: 1:30}\n", "line 3: YAML reads 1:30 in base 8 or 60"),
        ("run_dir: ''\n", "run_dir: is empty"),
        ("cache: {dir: ' '}\n", "cache.dir: is empty"),
        ("evaluate: {tasks: ['']}\n", "evaluate.tasks: is empty"),
        ("student: {options: {1: 2}}\n", "student.options: 1 is no text, as a name is"),
        ("student: {options: {a: 1, true: 2}}\n", "student.options: True is no text, as a name is"),
        ('run_dir: "a\\0b"\n', "run_dir: 'a\\x00b' has control characters"),
    ],
)
def test_a_text_that_says_something_else_than_it_seems_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(write(tmp_path, "corpus: {path: c}\nteacher: {model: t}\n" + text))


def test_anchors_may_be_used(tmp_path: Path) -> None:
    text = "corpus: {path: c}\nteacher: {model: &m t}\nstudent: {class_path: huggingface, options: {model: *m}}\n"
    assert load_experiment(write(tmp_path, text), []).student.options == {"model": "t"}


@pytest.mark.parametrize("section", ["student", "teacher"])
def test_a_section_may_hold_a_class_path_alone(tmp_path: Path, section: str) -> None:
    text = yaml.safe_dump({"corpus": {"path": "c"}, section: {"class_path": "own.py:Own"}})
    experiment = load_experiment(write(tmp_path, text), ["--teacher.model", "t", "--student.options.layers", "2"])
    assert getattr(experiment, section).class_path == "own.py:Own"
    assert experiment.student.options == {"layers": 2}
