"""A bucket of S3's kind, on a server of this machine: caches and students go there, are read there, and come back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket; the variables that lead there are those that S3's own programs read."""
    server_module = pytest.importorskip("moto.server", reason="moto is a server of S3 for tests")
    pytest.importorskip("s3fs")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="ours")
        yield "s3://ours"
    server.stop()


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_two_students_and_a_run_read_one_cache_in_a_bucket(
    bucket: str, finished: Any, distill: Any, tmp_path: Path
) -> None:
    url = f"{bucket}/cache"
    assert f"push: {url} is complete" in distill("push", finished.cache, "--to", url).done().out
    assert "nothing to do" in distill("push", finished.cache, "--to", url).done().out
    distill("push", finished.run, "--to", url).refused("holds something else", "give another --to")
    shown = distill("inspect", url).done().out
    assert f"cache            {url}" in shown and "bytes a position" in shown
    distill("inspect", url, "--verify").refused("--verify")
    few = ["--train.max_steps", 3, "--evaluate.control", "false", "--evaluate.max_samples", 4]
    for run, where in (("here", finished.cache), ("one", url), ("two", url)):
        own = ["--run_dir", tmp_path / run, "--cache.dir", where, *few, "--train.seed", 1 if run == "two" else 0]
        distill("run" if run == "one" else "train-student", finished.file, *own).done()
    here, one, two = (load_file(tmp_path / run / "student/model.safetensors") for run in ("here", "one", "two"))
    assert all(torch.equal(here[name], one[name]) for name in here), "the bits of a local cache"
    assert not all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "one/evaluation.json").is_file()
    own = ["--cache.dir", url, "--run_dir", tmp_path / "plan"]
    assert "cache 0 B" not in distill("plan", finished.file, *own, "--card", "12GiB").done().out
    distill("run", finished.file, *own, "--cache.threshold", 0.1).refused("made with other settings", "threshold")
    distill("run", finished.file, "--cache.dir", f"{bucket}/nothing", "--run_dir", tmp_path / "run").refused(
        "no cache here", "distill push"
    )
    distill("pull", url, "--to", tmp_path / "cache").done()
    ours, theirs = hashes(finished.cache), hashes(tmp_path / "cache")
    assert {name: theirs[name] for name in ours} == ours and theirs.keys() - ours == {"README.md", "SHA256SUMS"}
    assert "0 not\n" in distill("inspect", tmp_path / "cache", "--verify").done().out, "a whole cache, card and all"
    assert "complete" in distill("cache-teacher", finished.file, "--cache.dir", tmp_path / "cache").done().out


def test_parts_are_joined_from_a_bucket(bucket: str, finished: Any, distill: Any, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"part{number}"
        distill("cache-teacher", finished.file, "--cache.dir", folder, "--cache.part", f"{number}/2").done()
        distill("push", folder, "--to", f"{bucket}/parts/{number}").done()
    distill("merge", f"{bucket}/parts/1", f"{bucket}/parts/2", "--to", tmp_path / "whole").done()
    assert hashes(tmp_path / "whole") == hashes(finished.cache)


def test_a_student_goes_with_its_report_as_card(
    bucket: str, finished: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "student" in distill("push", finished.run, "--to", f"{bucket}/student").done().out
    distill("pull", f"{bucket}/student", "--to", tmp_path / "student").done()
    assert (tmp_path / "student/README.md").read_bytes() == (finished.run / "report.md").read_bytes()
    weights = (tmp_path / "student/model.safetensors").read_bytes()
    assert weights == (finished.run / "student/model.safetensors").read_bytes()
    distill("export", tmp_path / "student", "--to", tmp_path / "hf").done()


def test_what_cannot_be_pushed_is_told_in_a_line(bucket: str, finished: Any, distill: Any, tmp_path: Path) -> None:
    distill("push", finished.run, "--to", "s3://nobodys/student").refused("s3://nobodys/student")
    distill("push", finished.run, "--to", str(tmp_path)).refused("give a URL")
    distill("push", tmp_path / "nowhere", "--to", f"{bucket}/x").refused("no such folder")
    (tmp_path / "empty").mkdir()
    distill("push", tmp_path / "empty", "--to", f"{bucket}/x").refused("holds neither a finished student nor a cache")
    distill("pull", f"{bucket}/nothing", "--to", tmp_path / "x").refused("nothing that `distill push` finished")
    distill("pull", "gopher://x/y", "--to", tmp_path / "x").refused("gopher")
    part = tmp_path / "part"
    distill("cache-teacher", finished.file, "--cache.dir", part).done()
    journal = (part / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (part / "journal.jsonl").write_bytes(b"".join(journal[:-1]))
    distill("push", part, "--to", f"{bucket}/half").refused("is not finished (1 of")
