"""`distill run` with rounds: the student writes, the teacher scores, the student learns on; killed, and refused."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import cli
from distill.cache.making.writer import CacheWriter
from distill.errors import UserError
from distill.experiment.file import load_experiment
from distill.experiment.last_steps import check_last_steps
from distill.experiment.precision import with_types_of_machine
from distill.experiment.rounds import Rounds
from distill.experiment.stages import as_overrides, stages
from distill.generation.folder import WrittenFolder
from distill.recipes.evaluate.results import Results
from distill.training.checkpoints import KeepCheckpoints

pytestmark = pytest.mark.usefixtures("one_thread")
SECTIONS: dict[str, Any] = {
    "cache": {"max_samples": 16, "held_out_samples": 2},
    "train": {"max_steps": 3, "checkpoint_every_steps": 1, "loggers": ["csv"]},
    "evaluate": {"control": True, "max_samples": 4, "own_texts": 4},
    "generate": {"prompt_tokens": 8, "max_new_tokens": 12, "group": 32, "batch_size": 32},
    "rounds": {"count": 2},
}
MODELS = ("rounds/0/student", "rounds/1/student", "student", "control")
TEXTS = ("rounds/1/written", "rounds/2/written", "cache/shards", "rounds/1/cache/shards", "rounds/2/cache/shards")


@pytest.fixture(scope="module")
def undisturbed(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two rounds that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    said = distill("run", world.write(folder / "experiment.yaml", **SECTIONS)).done().out
    titles = [line.partition(";")[0] for line in said.splitlines() if re.match(r"round \d of", line)]
    kinds = ["the student writes", "the teacher reads it", "training"]
    assert titles == ["round 0 of 2: the teacher reads the corpus", "round 0 of 2: training"] + [
        f"round {number} of 2: {kind}" for number in (1, 2) for kind in kinds
    ]
    assert "round 2 of 2: the student writes; about" in said and "left up to the evaluation" in said
    return folder / "run"


@pytest.fixture
def kill_each_phase_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Have processes killed at the second step of a phase, one in each folder; return the folders so far.

    The processes are forks of this one, and note on the disk where they died.
    """
    seen: dict[Path, int] = {}
    notes = tmp_path / "killed.txt"
    notes.touch()

    def deadly(owner: type, name: str, folder_of: Callable[[Any], Path]) -> None:
        original: Any = getattr(owner, name)

        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            folder = folder_of(self)
            seen[folder] = seen.get(folder, 0) + 1
            if seen[folder] == 2 and str(folder) not in notes.read_text().splitlines():
                with notes.open("a") as file:
                    file.write(f"{folder}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, name, method)

    deadly(WrittenFolder, "add", lambda self: self.folder)
    deadly(CacheWriter, "add", lambda self: self.folder)
    deadly(KeepCheckpoints, "_save", lambda self: self.folder)
    deadly(Results, "put", lambda self: Path("evaluation"))
    return lambda: notes.read_text().splitlines()


def test_each_stage_begins_without_the_models_of_the_one_before(
    world: Any, distill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trainer and its model refer to each other: until the collector comes by, they would lie beside the teacher."""
    recipe_of, found = cli._recipe_of, []

    def counting(step: str) -> Any:
        found.append(sum(issubclass(type(each), torch.nn.Module) for each in gc.get_objects()))
        return recipe_of(step)

    sections = {"cache": {"max_samples": 4}, "train": {"max_steps": 1}, "evaluate": {"max_samples": 2}}
    file = world.write(tmp_path / "experiment.yaml", **sections)
    monkeypatch.setattr(cli, "_recipe_of", counting)
    gc.collect()
    gc.disable()
    try:
        distill("run", file).done()
    finally:
        gc.enable()
    assert len(found) == 4 and max(found) <= found[0], "the command, then teacher, training, evaluation"


@pytest.mark.skipif(torch.cuda.is_available() or not hasattr(os, "fork"), reason="forks, which CUDA does not survive")
def test_killed_once_in_each_phase_it_goes_on_to_the_same_run(
    undisturbed: Path, world: Any, program: Any, kill_each_phase_once: Any, contents: Any, tmp_path: Path
) -> None:
    """Real processes and SIGKILL: in each write, score, train and evaluate."""
    file, starts, status = world.write(tmp_path / "experiment.yaml", **SECTIONS), 0, None
    while status != 0:
        starts += 1
        with open(tmp_path / "said.txt", "wb") as said:
            status = program(["run", file], said.fileno(), said.fileno()).wait()
        assert status in (0, -signal.SIGKILL), (tmp_path / "said.txt").read_text()
        assert len(kill_each_phase_once()) == starts - (status == 0), "each start gets further than the one before"
    assert starts - 1 == 3 + 4 + 2 + 1, "caches, trainings of the student and the control, texts, evaluation"
    run = tmp_path / "run"
    for folder in TEXTS:
        assert contents(run / folder) == contents(undisturbed / folder), folder
    for folder in MODELS:
        ours, theirs = (load_file(each / folder / "model.safetensors") for each in (run, undisturbed))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), folder
    ours, theirs = (json.loads((each / "evaluation.json").read_text()) for each in (run, undisturbed))
    assert all(ours[key] == theirs[key] for key in ("fidelity", "own_texts", "rounds"))


def test_the_report_draws_the_rounds(undisturbed: Path) -> None:
    found = json.loads((undisturbed / "evaluation.json").read_text())
    assert [each["round"] for each in found["rounds"]] == [0, 1, 2]
    last = {"held_out_kl": found["fidelity"]["student"]["kl"], "own_kl": found["own_texts"]["student"]["kl"]}
    assert found["rounds"][2] == {"round": 2, **last}
    assert found["rounds"][0]["own_kl"] == found["own_texts"]["round 0"]["kl"] and "seeds" not in found
    assert "KL by rounds" in (undisturbed / "report.html").read_text()


def test_a_finished_run_does_nothing_again(
    undisturbed: Path, distill: Any, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = untouched(undisturbed / "rounds"), untouched(undisturbed / "student")
    said = distill("run", undisturbed.parent / "experiment.yaml").done().out
    assert said.count("nothing to do") == 2 + 3 + 4 + 1 and "left up to" not in said
    assert (untouched(undisturbed / "rounds"), untouched(undisturbed / "student")) == before
    assert not (undisturbed / "rounds/1/checkpoints/student").exists(), "a round's go with the next one's student"


def test_each_round_begins_with_the_student_before_and_the_control_never_sees_one(undisturbed: Path) -> None:
    control, last = (json.loads((undisturbed / name / "settings.json").read_text()) for name in ("control", "student"))
    assert control["train"]["max_steps"] == 9 and "caches" not in control and "begins_with" not in control
    shares = [count for _, count in last["caches"].values()]
    assert shares[2] == sum(shares) // 2 and abs(shares[0] - shares[1]) <= 1, "half its own, the rest divided equally"
    loss = (undisturbed / "rounds/1/logs/student").rglob("metrics.csv")
    assert list(loss), "each round has its curves"


def test_a_stage_is_a_command_of_its_own(undisturbed: Path, untouched: Any, distill: Any) -> None:
    """As for a training on several devices, whose processes are started with a command line."""
    file = undisturbed.parent / "experiment.yaml"
    experiment, before = load_experiment(str(file), []), untouched(undisturbed / "rounds")
    for stage in list(stages(experiment))[2:5]:
        said = distill(stage.command, file, *as_overrides(stage.experiment, experiment)).done().out
        assert "nothing to do" in said
    assert untouched(undisturbed / "rounds") == before
    distill("train-student", file).refused("distill run", "--rounds.count 0")


def test_what_held_out_samples_serve_is_not_asked_of_a_rounds_own_cache(undisturbed: Path) -> None:
    asked = ["--train.early_stopping", "3", "--train.texts_every_steps", "2", "--evaluate.texts", "1"]
    rounds = Rounds(load_experiment(str(undisturbed.parent / "experiment.yaml"), asked))
    check_last_steps(rounds.scoring(1))
    assert rounds.training(1).train.texts_every_steps == 2


def test_auto_takes_the_types_of_the_first_round(undisturbed: Path) -> None:
    file, auto = (
        undisturbed.parent / "experiment.yaml",
        ["--teacher.compute_dtype", "auto", "--train.precision", "auto"],
    )
    rounds = Rounds(load_experiment(str(file), auto))
    assert rounds.scoring(1).teacher.compute_dtype == "float32", "as the first cache"
    assert with_types_of_machine(rounds.training(1)).train.precision == "32-true", "as the student that it begins with"


def test_without_a_corpus_the_fresh_student_writes_first(world: Any, distill: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    about = ("peace", "war", "corn", "tea", "salt", "law")
    prompts.write_text("".join(json.dumps({"prompt": f"What is said of {word}?"}) + "\n" for word in about))
    sections = {
        **SECTIONS,
        "corpus": {"path": None, "held_out": 0.3},
        "evaluate": {"control": False},
        "student": {"class_path": "huggingface", "options": {"model": str(world.folder / "teacher")}},
        "rounds": {"count": 2, "prompts": str(prompts), "share": 1, "samples_per_prompt": 4},
        "train": {**SECTIONS["train"], "learning_rate": 0.01},
    }
    file = world.write(tmp_path / "experiment.yaml", **sections)
    said = distill("run", file).done().out
    assert "the fresh student writes 24 texts" in said and "round 0" not in said
    run = tmp_path / "run"
    settings = json.loads((run / "student/settings.json").read_text())
    assert "caches" not in settings, "a share of 1: of its own texts alone"
    assert (run / "evaluation.json").exists() and not (run / "cache").exists()
    assert "is trained" in distill("run", file).done().out
    distill("evaluate", file).done()


def test_a_search_for_the_students_sizes_is_made_in_the_first_round_alone(
    world: Any, distill: Any, tmp_path: Path
) -> None:
    sections = {
        **SECTIONS,
        "student": {"options": {"layers": None}, "search": {"share": 0.5, "candidates": 2, "steps": 1}},
        "evaluate": {"control": False},
        "rounds": {"count": 1},
    }
    file = Path(world.write(tmp_path / "experiment.yaml", **sections))
    file.write_text(file.read_text().replace("    layers: null\n", "").replace("  options:\n", "  options: {}\n"))
    assert distill("run", file).done().out.count("search: the best is") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--loss.divergence", "reverse_kl"], ["reverse_kl", "cache.scheme"]),
        (["--rounds.prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--evaluate.seeds", "2"], ["evaluate.seeds"]),
        (["--train.caches", '{"a": 1}'], ["train.caches: rounds choose"]),
        (["--cache.part", "1/2"], ["rounds: one machine"]),
        (["--rounds.share", "0"], ["rounds.share: 0"]),
        (["--rounds.cout", "1"], ["rounds.cout", "count"]),
    ],
    ids=["divergence", "prompts", "seeds", "caches", "part", "share", "key"],
)
def test_rounds_that_cannot_be_made_are_refused_first(
    world: Any, distill: Any, tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    distill("run", world.write(tmp_path / "experiment.yaml", **SECTIONS), *changes).refused(*words)
    assert not (tmp_path / "run/cache").exists()


def test_rounds_without_a_corpus_lack_prompts_or_a_control(world: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", corpus={"path": None}, rounds={"count": 1})
    own = ["--rounds.prompts", "prompts.jsonl", "--generate.by", "student", "--generate.to", "texts"]
    assert load_experiment(file, own).generate.by == "student", "what is asked for by name is not changed"
    assert load_experiment(file, own[:2]).generate.by == "fresh", "as plan counts it"
    with pytest.raises(UserError, match=r"rounds\.prompts: is missing.*"):
        load_experiment(file, [])
    with pytest.raises(UserError, match=r"evaluate\.control: a control learns"):
        load_experiment(file, ["--rounds.prompts", "prompts.jsonl", "--evaluate.control", "true"])


def test_prompts_that_ask_nothing_are_refused_before_the_teacher(world: Any, distill: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": [{"role": "assistant", "content": "Hello."}]}) + "\n")
    file = world.write(tmp_path / "experiment.yaml", **SECTIONS)
    distill("run", file, "--rounds.prompts", bad).refused("no user's message")
    assert not (tmp_path / "run/cache").exists()


def test_another_student_does_not_begin_with_these_weights(undisturbed: Path, distill: Any, tmp_path: Path) -> None:
    own = ["--rounds.count", 0, "--run_dir", tmp_path / "run", "--cache.dir", undisturbed / "cache"]
    begun = ["train-student", undisturbed.parent / "experiment.yaml", *own, "--train.begin_from"]
    distill(*begun, undisturbed, "--student.options.layers", 3, "--evaluate.control", "false").refused(
        "another student"
    )
    distill(*begun, tmp_path / "nowhere").refused("nowhere", "settings.json")
    distill(*begun, undisturbed / "rounds/1", "--evaluate.control", "false").refused("no checkpoint any more")


def test_a_plan_counts_all_rounds(world: Any, distill: Any, tmp_path: Path) -> None:
    """The trainings grow with the texts, and the control makes the steps of all; without a corpus all is written."""
    train = {**SECTIONS["train"], "max_steps": None}
    file = world.write(tmp_path / "experiment.yaml", **{**SECTIONS, "train": train})
    planned = {
        count: json.loads(distill("plan", file, "--rounds.count", count, "--json").done().out) for count in (0, 1, 2)
    }
    one, two = (planned[count]["rounds"] for count in (1, 2))
    assert planned[0]["rounds"] is None and "rounds" not in planned[0]["disk"]
    assert (one["texts"], one["tokens"], two["rounds"]) == (40, 40 * 12, 2) and "written" not in planned[2]["disk"]
    assert two["writing_seconds"] == 2 * one["writing_seconds"] > 0
    assert two["scoring_seconds"] == 2 * one["scoring_seconds"] > 0
    assert two["training_seconds"] > 2 * one["training_seconds"] > 0, "a mixture of more samples has more steps"
    assert planned[2]["disk"]["rounds"] > planned[1]["disk"]["rounds"] > 0
    assert "rounds: 2 more, up to 40 texts and 480 tokens each" in distill("plan", file).done().out
    bare = ["--corpus.path", "null", "--evaluate.control", "false", "--rounds.prompts", world.folder / "corpus.jsonl"]
    planned[3] = json.loads(distill("plan", file, *bare, "--json").done().out)
    assert planned[3]["rounds"]["rounds"] == 1 and planned[3]["disk"]["written"] > 0
    assert any("480 tokens of the fresh" in note for note in planned[3]["notes"])
