"""Traps in a run, a cache, a corpus and an experiment file, one a case, and the command that opens it."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from hostile_traps import Touch, add, change, link, pipe

# A run that is gone on with, or compared.


def gone_on_with(name: str, target: str, *statuses: int) -> None:
    @add(f"run: {name} leads out", *statuses)
    def _(place: Path, outside: Path) -> list[str]:
        shutil.rmtree(place / "run/student")
        link(place / "run" / name, outside / target)
        return ["run", str(place / "experiment.yaml")]


gone_on_with("costs.jsonl", "secrets/key")
gone_on_with("measured.jsonl", "secrets/key")
gone_on_with("cache", "secrets")
gone_on_with("checkpoints/student", "secrets")
gone_on_with("logs/student/metrics.csv", "secrets/key")
gone_on_with("report.html", "secrets/key")
gone_on_with(".student.new", "secrets")


@add("run: a pickled checkpoint")
def _(place: Path, outside: Path) -> list[str]:
    shutil.rmtree(place / "run/student")
    for path in (place / "run/checkpoints/student").glob("*.ckpt"):
        path.write_bytes(pickle.dumps(Touch(outside.parent / "ran")))
    return ["train-student", str(place / "experiment.yaml"), "--resume"]


for _name in ("evaluation.json", "costs.jsonl", "logs/student/metrics.csv", "forecast.json"):

    @add(f"run: {_name} is a pipe")
    def _(place: Path, outside: Path, name: str = _name) -> list[str]:
        (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        pipe(place / "run" / name)
        return ["compare", str(place / "run"), str(place / "run"), "--to", str(place / "page.html")]


# A cache.


def cache(name: str, setter: Callable[[Path, Path], None], *options: str, statuses: tuple[int, ...] = (2,)) -> None:
    @add(f"cache: {name}", *statuses)
    def _(place: Path, outside: Path) -> list[str]:
        setter(place / "run/cache", outside)
        return ["inspect", str(place / "run/cache"), *options]


def _shard(folder: Path) -> Path:
    return sorted((folder / "shards").iterdir())[0]


def _tokenizer_with_code(folder: Path, outside: Path) -> None:
    shutil.copy(outside / "evil.py", folder / "tokenizer/evil.py")
    change(
        folder / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model"] * 2}, tokenizer_class="M"
    )
    files = sorted(path for path in (folder / "tokenizer").iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "tokenizer/SHA256SUMS").write_text("".join(sums))


def _shards(folder: Path, outside: Path) -> None:
    shutil.copytree(folder / "shards", outside / "shards", dirs_exist_ok=True)
    for path in (outside / "shards").iterdir():
        path.write_bytes(b"damaged, so that a repair would delete it")
    link(folder / "shards", outside / "shards")


cache("shards elsewhere", _shards, "--repair")
cache("a shard elsewhere", lambda f, o: link(_shard(f), o / "secrets/key"), "--repair", statuses=(0,))
cache("a tokenizer elsewhere", lambda f, o: link(f / "tokenizer", o / "secrets"), "--repair")
cache(
    "a tokenizer's file elsewhere",
    lambda f, o: link(f / "tokenizer/tokenizer.json", o / "tokenizer.json"),
    "--sample",
    "0",
)
cache("remains elsewhere", lambda f, o: link(f / "tokenizer.tmp", o / "secrets"), "--repair")
cache("a tokenizer with code", _tokenizer_with_code, "--sample", "0", statuses=(0, 2))
cache("a manifest without end", lambda f, o: link(f / "manifest.json", "/dev/zero"), "--verify", statuses=(1, 2))
cache("a journal that is a pipe", lambda f, o: pipe(f / "journal.jsonl"))
cache("a part that is a pipe", lambda f, o: pipe(f / "part.json"), "--verify", statuses=(1, 2))
cache("a shard that is a pipe", lambda f, o: pipe(_shard(f)), "--verify", statuses=(1,))


@add("cache: notes elsewhere, merged")
def _(place: Path, outside: Path) -> list[str]:
    link(place / "run/cache/notes/key", outside / "secrets/key")
    return ["merge", str(place / "run/cache"), "--to", str(place / "whole")]


def training_from_url(place: Path) -> list[str]:
    """A command that copies the cache from a URL."""
    experiment, cache = str(place / "experiment.yaml"), f"file://{place}/run/cache"
    return ["train-student", experiment, "--run_dir", str(place / "other"), "--cache.dir", cache]


@add("cache: notes elsewhere, at a URL", 0)
def _(place: Path, outside: Path) -> list[str]:
    link(place / "run/cache/notes/key", outside / "secrets/key")
    return training_from_url(place)


@add("cache: a tokenizer elsewhere, at a URL")
def _(place: Path, outside: Path) -> list[str]:
    link(place / "run/cache/tokenizer/tokenizer.json", outside / "secrets/key")
    return training_from_url(place)


# A corpus, and an experiment file.


def corpus(name: str, file: str, setter: Callable[[Path, Path], object]) -> None:
    @add(f"corpus: {name}")
    def _(place: Path, outside: Path) -> list[str]:
        (place / "corpus").mkdir()
        setter(place / "corpus" / file, outside)
        return [
            "cache-teacher",
            str(place / "experiment.yaml"),
            "--corpus.path",
            str(place / "corpus"),
            "--run_dir",
            str(place / "new"),
        ]


corpus("a pipe", "a.jsonl", lambda path, _: pipe(path))
corpus("a file without end", "a.txt", lambda path, _: link(path, "/dev/zero"))
corpus("a file elsewhere", "a.jsonl", lambda path, outside: link(path, outside / "text.jsonl"))
corpus("a folder elsewhere", "a", lambda path, outside: link(path, outside))
corpus("a link to nothing", "a.csv", lambda path, _: link(path, "nothing"))
corpus("gzip without end, text", "a.txt.gz", lambda path, _: path.write_bytes(gzip.compress(b" " * 2**28)))
corpus("gzip without end, rows", "a.jsonl.gz", lambda path, _: path.write_bytes(gzip.compress(b"\n" * 2**28)))
corpus("gzip without end, table", "a.csv.gz", lambda path, _: path.write_bytes(gzip.compress(b"text\n" + b'"' * 2**28)))


def experiment(name: str, setter: Callable[[Path], object]) -> None:
    @add(f"experiment: {name}")
    def _(place: Path, outside: Path) -> list[str]:
        (place / "experiment.yaml").unlink()
        setter(place / "experiment.yaml")
        return ["plan", str(place / "experiment.yaml")]


_LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True)
)
experiment("a pipe", pipe)
experiment("a file without end", lambda path: link(path, "/dev/zero"))
experiment("a tag that calls", lambda path: path.write_text("corpus: !!python/object/apply:os.system [touch ran]\n"))
experiment("a value that doubles", lambda path: path.write_text(f"{_LAUGHS}corpus: *z\nteacher: {{model: t}}\n"))
experiment("a nesting without end", lambda path: path.write_text("[" * 9**5))


@add("experiment: a pipe among the tasks")
def _(place: Path, outside: Path) -> list[str]:
    (place / "tasks").mkdir()
    pipe(place / "tasks/a.yaml")
    content = yaml.safe_load((place / "experiment.yaml").read_text())
    content["evaluate"] |= {"tasks": ["piqa"], "tasks_path": str(place / "tasks")}
    (place / "experiment.yaml").write_text(yaml.safe_dump(content))
    return ["evaluate", str(place / "experiment.yaml")]
