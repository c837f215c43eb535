"""`distill generate`: the texts, the bytes after a kill, the corpus made of them, and prompts that are refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.corpus import open_corpus
from distill.errors import UserError
from distill.experiment.file import load_experiment
from distill.experiment.generation import prompt_sources
from distill.forecast.writing import is_asked, written_tokens
from distill.system.files import sha256_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = [f"What does the Congress say about {word}?" for word in ("peace", "war", "the great public debt", "corn")]


@pytest.fixture
def generate(world: Any, distill: Any, tmp_path: Path) -> Callable[..., Any]:
    """`generate("--generate.seed", 1)`: run generate on four questions, two to a part, in the test's own run folder."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    sections = {"generate": {"prompts": str(prompts), "max_new_tokens": 12, "group": 2}}
    file = world.write(tmp_path / "experiment.yaml", **sections)
    return lambda *arguments: distill("generate", file, *arguments)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(folder.glob("parts/*")) for line in part.read_text().splitlines()]


def test_greedy_answers_are_transformers_own_and_become_a_corpus(generate: Any, world: Any, tmp_path: Path) -> None:
    """Rows of the head beyond the vocabulary take no part, so transformers must not choose them either."""
    folder = world.folder / "teacher"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    padded = {"pad_token_id": 0, "suppress_tokens": list(range(len(tokenizer), model.config.vocab_size))}
    done = generate("--generate.temperature", 0).done()
    assert "4 texts of at most 12 tokens, for 4 prompts" in done.out
    found = rows(tmp_path / "run/written")
    assert [(row["prompt"], row["sample"]) for row in found] == [(number, 0) for number in range(4)]
    for row, question in zip(found, QUESTIONS, strict=True):
        asked = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text)])
        theirs = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=[0, 2], **padded)[0]
        assert row["input_ids"] == theirs.tolist() and row["prompt_tokens"] == ids.shape[1]
        assert row["ended"] == (theirs[-1] in (0, 2))
        assert row["messages"][0] == asked[0] and row["messages"][1]["role"] == "assistant"
    samples = open_corpus(str(tmp_path / "run/written"), tokenizer, sequence_length=64, pack=False, held_out=0).train
    left = {str(row["input_ids"]): row["prompt_tokens"] for row in found}
    for sample in samples:
        length = int((sample["document_hash"] != 0).sum())
        prompt_tokens = left.pop(str(sample["input_ids"][:length].tolist()))
        learned = (sample["loss_mask"].nonzero().flatten() + 1).tolist()
        assert learned == list(range(prompt_tokens, length)), "the written tokens alone, each by the one before"
    assert not left


def test_killed_it_goes_on_to_the_same_bytes(
    world: Any, distill: Any, stop: Any, contents: Any, untouched: Any, generate: Any, tmp_path: Path
) -> None:
    generate("--generate.to", tmp_path / "undisturbed", "--generate.samples_per_prompt", 20).done()
    written, file = tmp_path / "run/written", str(tmp_path / "experiment.yaml")
    journal = written / "journal.jsonl"
    command = ("generate", file, "--generate.samples_per_prompt", "20")
    stopped = stop(signal.SIGKILL, lambda out: journal.exists() and b"\n" in journal.read_bytes(), *command)
    assert stopped.status == -signal.SIGKILL
    if len(list(written.glob("parts/*.jsonl"))) == 1:  # a busy machine may be slow to kill
        (written / "parts/000001.jsonl").write_text("half a part")  # of which the journal knows nothing
        assert "1 of 2 parts are there; continuing" in distill(*command).done().out
    assert contents(written) == contents(tmp_path / "undisturbed")
    before = untouched(written)
    assert "nothing to do" in distill(*command).done().out
    assert untouched(written) == before
    (written / "parts/000000.jsonl").unlink()
    distill(*command).done()
    assert contents(written / "parts") == contents(tmp_path / "undisturbed/parts")


def test_a_folder_of_other_settings_prompts_or_things_is_refused(generate: Any, tmp_path: Path, untouched: Any) -> None:
    generate().done()
    before = untouched(tmp_path / "run/written")
    generate("--generate.temperature", 0.5).refused("other settings", "generate.temperature: 1.0 there, 0.5 here")
    generate("--generate.max_prompts", 3).refused("prompts: 4 there, 3 here", "--generate.to")
    generate("--teacher.compute_dtype", "bfloat16").refused("fingerprint of quantization: none, float32 there")
    assert untouched(tmp_path / "run/written") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    generate("--generate.to", tmp_path / "mine").refused("is not empty")
    generate("--generate.to", tmp_path / "mine/notes.txt").refused("notes.txt", "is a file")
    generate("--generate.prompts", tmp_path / "run/written").refused("generate.prompts", "written texts")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, ["no user's message"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, ["role system"]),
        ({"prompt": "peace and war " * 300}, ["tokens, and the writer reads 256"]),
        ({"question": " "}, ["no prompt in it"]),
        ({"completion": "Peace."}, ["row 1", "generate.columns"]),
    ],
    ids=["no user", "ends with system", "too long", "empty", "no prompt"],
)
def test_rows_that_give_no_prompt_are_refused_in_a_line(
    generate: Any, tmp_path: Path, row: dict[str, Any], words: list[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row) + "\n")
    generate("--generate.prompts", bad).refused(*words)
    assert not (tmp_path / "run/written").exists()


def test_settings_without_a_place_are_refused(generate: Any, world: Any, tmp_path: Path) -> None:
    generate("--generate.thinking", "true").refused("generate.thinking", "enable_thinking")
    generate("--generate.by", "student").refused("no trained student here", "train-student")
    generate("--generate.by", "control").refused("--evaluate.control true")
    for address in ("127.0.0.1:8080", "http://", "http://127.0.0.1:port/v1"):
        generate("--generate.server", address).refused(f"generate.server: {address} is no address")
    (tmp_path / "empty.jsonl").write_text("")
    generate("--generate.prompts", tmp_path / "empty.jsonl").refused("empty.jsonl")
    base = tmp_path / "base"
    shutil.copytree(world.folder / "teacher", base)
    for file in base.glob("chat_template*"):
        file.unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    generate("--teacher.model", base).refused("no chat template")


def test_a_plan_counts_the_writing_and_what_is_learned_from_it(generate: Any, distill: Any, tmp_path: Path) -> None:
    written = tmp_path / "run/written"
    command = ("plan", tmp_path / "experiment.yaml", "--corpus.path", written, "--corpus.held_out", 0, "--json")
    planned = json.loads(distill(*command).done().out)
    assert any("up to 4 texts and 48 tokens of the teacher; about" in note for note in planned["notes"])
    assert planned["disk"]["written"] == 11 * (48 + 4 * 100)
    assert any("about 10 samples" in note for note in planned["notes"]), "448 tokens to come, of 48 a sample"
    generate().done()
    experiment = load_experiment(str(tmp_path / "experiment.yaml"), ["--corpus.path", str(written)])
    assert not is_asked(experiment), "the texts are there"
    assert written_tokens(experiment, str(written)) == sum(len(row["input_ids"]) for row in rows(written))


def test_of_prompts_on_the_hub_no_more_is_fetched_than_is_written_on(generate: Any, tmp_path: Path) -> None:
    generate("--generate.prompts", "owner/name").refused("generate.max_prompts: owner/name is a hub data set")
    many = ["--generate.prompts", "owner/name", "--generate.max_prompts", "7"]
    (source,) = prompt_sources(load_experiment(str(tmp_path / "experiment.yaml"), many))
    assert source.limit == 7


def test_plain_texts_are_continued_and_cached(generate: Any, distill: Any, world: Any, tmp_path: Path) -> None:
    """The corpus of the experiment gives the prompts, and the cache of what was written trains a student."""
    written = tmp_path / "run/written"
    own = ["--generate.prompts", world.folder / "corpus.jsonl", "--generate.prompt_tokens", 8, "--generate.group", 64]
    generate(*own).done()
    found = rows(written)
    assert len(found) == 40 and all(row["prompt_tokens"] == 8 and "text" in row for row in found)
    file = tmp_path / "experiment.yaml"
    cached = distill("cache-teacher", file, "--corpus.path", written, "--cache.max_samples", 4).done()
    assert "40 texts of a model" in cached.out and "texts of a model, 40 rows" in cached.out


@pytest.fixture(scope="module")
def texts(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 continued texts."""
    folder = tmp_path_factory.mktemp("texts")
    file = world.write(folder / "experiment.yaml", generate={"prompt_tokens": 8, "max_new_tokens": 8})
    distill("generate", file).done()
    return folder / "run/written"


@pytest.fixture
def corpus(texts: Path, world: Any, tmp_path: Path) -> Callable[..., Any]:
    """`corpus(change)`: the corpus of a copy of `texts` with its first row changed."""

    def read(change: Callable[[dict[str, Any]], dict[str, Any]], tokenizer: Any = None, **options: Any) -> Any:
        folder = tmp_path / "copy"
        shutil.copytree(texts, folder)
        part = folder / "parts/000000.jsonl"
        first, *others = part.read_text().splitlines(keepends=True)
        part.write_text("".join([json.dumps(change(json.loads(first))) + "\n", *others]))
        lines = (folder / "journal.jsonl").read_text().splitlines()
        entry = json.loads(lines[0]) | {"sha256": sha256_of(part)}
        (folder / "journal.jsonl").write_text(json.dumps(entry) + "\n")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(world.folder / "teacher")
        return open_corpus(str(folder), tokenizer, sequence_length=16, pack=False, held_out=0, **options)

    return read


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": [1, 2, 999]}, "token 999"),
        ({"input_ids": "1 2"}, "not a text as"),
        ({"prompt_tokens": 99}, "not a text as"),
        ({"document": "no hash"}, "not a text as"),
    ],
    ids=["beyond the vocabulary", "no list", "longer than the text", "no hash"],
)
def test_a_row_that_was_never_written_is_refused(corpus: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"row 1: .*{words}"):
        corpus(lambda row: row | {"prompt_tokens": 1} | change)


def test_only_texts_that_ended_are_learned_if_asked(corpus: Any, texts: Path) -> None:
    sets = corpus(lambda row: row | {"ended": True}, cut="drop")
    assert sets.train.documents == 1 + sum(row["ended"] for row in rows(texts)[1:])
    assert rows(texts)[0]["text"] in list(sets.texts()), "for those who look for benchmarks in it"


def test_another_tokenizer_or_a_damaged_part_is_refused(corpus: Any, texts: Path, world: Any, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "teacher")
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match="another tokenizer"):
        corpus(lambda row: row, tokenizer)
    part = tmp_path / "copy/parts/000000.jsonl"
    part.write_bytes(part.read_bytes()[:-1])
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "teacher")
    with pytest.raises(UserError, match="not as it was written"):
        open_corpus(str(tmp_path / "copy"), tokenizer, sequence_length=16)
    (tmp_path / "copy/journal.jsonl").unlink()
    with pytest.raises(UserError, match="0 of 1 parts are written"):
        open_corpus(str(tmp_path / "copy"), tokenizer, sequence_length=16)


def test_a_text_is_held_out_where_its_document_is(texts: Path, world: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "teacher")
    fixed, written = (
        open_corpus(str(path), tokenizer, sequence_length=16, pack=False, held_out=0.2).held_out
        for path in (world.folder / "corpus.jsonl", texts)
    )
    beginnings = [{tuple(each["input_ids"][:8].tolist()) for each in samples} for samples in (fixed, written)]
    assert len(beginnings[1]) == fixed.documents and beginnings[1] <= beginnings[0]


def test_that_no_prompt_is_held_out_ends_no_round(texts: Path, world: Any) -> None:
    """By chance none of a few prompts is; a round reads no held-out text of its own."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "teacher")
    opened = partial(open_corpus, str(texts), tokenizer, sequence_length=16, pack=False, held_out=1e-9)
    assert not len(opened().held_out) and len(opened().train) == 40
    with pytest.raises(UserError, match="none of the 40 documents falls into the held-out share"):
        opened(most_held_out=1)


def test_a_student_of_fewer_tokens_writes_in_the_teachers_ids(
    finished: Any, train: Any, distill: Any, world: Any, tmp_path: Path
) -> None:
    few = ["--student.vocabulary", "corpus", "--evaluate.control", "false"]
    train(*few, "--train.max_steps", 2).done()
    own = [*few, "--generate.by", "student", "--generate.max_prompts", 6, "--generate.max_new_tokens", 6]
    own += ["--generate.prompt_tokens", 9]
    assert "the student writes" in distill("generate", *finished.elsewhere(tmp_path / "run"), *own).done().out
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "teacher")
    for row in rows(tmp_path / "run/written"):
        said = row["input_ids"][: -1 if row["ended"] else None]
        assert tokenizer.decode(said, skip_special_tokens=True) == row["text"]
    open_corpus(str(tmp_path / "run/written"), tokenizer, sequence_length=32, held_out=0)


def test_the_control_writes_too(finished: Any, distill: Any, tmp_path: Path) -> None:
    own = ["--generate.by", "control", "--generate.to", tmp_path / "texts", "--generate.max_new_tokens", 3]
    distill("generate", finished.file, *own, "--generate.max_prompts", 2).done()
    written = json.loads((tmp_path / "texts/written.json").read_text())
    assert written["fingerprints"]["writer"] == "control" and len(rows(tmp_path / "texts")) == 2
