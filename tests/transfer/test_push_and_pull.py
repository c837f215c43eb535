"""Folders pushed to a URL and pulled back: whole or resumed, checked by hashes, and never over anything."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distill.cache.format.folder import SUMS
from distill.errors import UserError
from distill.transfer import listing, remote
from distill.transfer.contents import made, of_model
from distill.transfer.download import download
from distill.transfer.listing import BEGUN
from distill.transfer.remote import open_remote
from distill.transfer.upload import upload

FILES = {"README.md": b"a card", "config.json": b"{}", "weights/one.bin": bytes(1000), "weights/two.bin": b"2" * 5000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    where = f"memory://{uuid.uuid4()}/model" if request.param == "memory" else f"file://{tmp_path}/bucket/model"
    yield where
    filesystem, root = fsspec.core.url_to_fs(where)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def push(folder: Path, url: str) -> tuple[bool, int, list[int]]:
    """Push, and return whether it was new, the bytes that were there, and the bytes of each file that was not."""
    there, sent = [0], []
    is_new = upload(of_model(folder), open_remote(url), lambda done: there.append(done), sent.append)
    return is_new, there[-1], sent


def pull(url: str, to: Path) -> list[int]:
    copied: list[int] = []
    download(open_remote(url), to, lambda total, done: copied.append(done), copied.append)
    return copied


def stored(url: str) -> dict[str, bytes]:
    filesystem, root = fsspec.core.url_to_fs(url)
    found = filesystem.find(root) if filesystem.exists(root) else []
    return {path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in found}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_of_it_goes_and_comes_back_and_nothing_is_done_twice(folder: Path, url: str, tmp_path: Path) -> None:
    assert push(folder, url) == (True, 0, [len(FILES[name]) for name in sorted(FILES)])
    there = stored(url)
    assert {name: there[name] for name in FILES} == FILES and there.keys() == {*FILES, SUMS}
    assert push(folder, url)[0] is False and stored(url) == there
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == there
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "back", check=True)
    with pytest.raises(UserError, match="nothing is overwritten"):
        pull(url, tmp_path / "back")


@pytest.mark.parametrize("files", range(len(FILES)))
def test_a_stopped_push_goes_on_with_what_is_not_there(
    files: int, folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def stopping(done: int) -> None:
        sent.append(done)
        if len(sent) == files:
            raise Stop

    sent: list[int] = []
    if files:
        with pytest.raises(Stop):
            upload(of_model(folder), open_remote(url), lambda _: None, stopping)
        assert SUMS not in stored(url) and BEGUN in stored(url)
        with pytest.raises(UserError, match="nothing that `distill push` finished"):
            pull(url, tmp_path / "early")
        name = sorted(FILES)[-1]  # one that was cut off on its way
        filesystem, root = fsspec.core.url_to_fs(url)
        filesystem.makedirs(f"{root}/weights", exist_ok=True)
        filesystem.pipe_file(f"{root}/{name}", FILES[name][:7])
    _, there, more = push(folder, url)
    assert there == sum(sent) and len(more) == len(FILES) - files
    assert stored(url).keys() == {*FILES, SUMS}
    pull(url, tmp_path / "back")
    assert {name: content(tmp_path / "back")[name] for name in FILES} == FILES


def test_nothing_there_is_overwritten(folder: Path, url: str) -> None:
    remote = open_remote(url)
    remote.put([made("notes.txt", b"mine")], lambda _: None)
    with pytest.raises(UserError, match=r"is not empty \(notes.txt is there\)"):
        push(folder, url)
    assert stored(url) == {"notes.txt": b"mine"}
    remote.remove("notes.txt")
    push(folder, url)
    there = stored(url)
    (folder / "config.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match="holds something else"):
        push(folder, url)
    assert stored(url) == there
    remote.put([made(BEGUN, there[SUMS])], lambda _: None)
    remote.remove(SUMS)
    with pytest.raises(UserError, match="the beginning of another push"):
        push(folder, url)


def test_a_stopped_pull_goes_on_and_a_changed_file_is_refused(folder: Path, url: str, tmp_path: Path) -> None:
    push(folder, url)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{root}/weights/two.bin", b"3" * 5000)
    with pytest.raises(UserError, match=r"weights/two\.bin is not what SHA256SUMS says"):
        pull(url, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    filesystem.pipe_file(f"{root}/weights/two.bin", FILES["weights/two.bin"])
    done, *copied = pull(url, tmp_path / "back")
    assert (done, sum(copied)) == (sum(map(len, FILES.values())) - 5000, 5000)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_file_that_changed_here_is_not_spread(folder: Path, url: str) -> None:
    entries = of_model(folder)
    (folder / "weights/one.bin").write_bytes(b"1" * 1000)
    with pytest.raises(UserError, match=r"one\.bin: has changed"):
        upload(entries, open_remote(url), lambda _: None, lambda _: None)
    assert SUMS not in stored(url)


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a//b", ".", "a\\b", "a\x1bb"])
def test_no_list_leads_out_of_the_folder(name: str, url: str, tmp_path: Path) -> None:
    for place in ("SHA256SUMS", "here"):
        open_remote(url).put([made(place, f"{'0' * 64}  {name}\n".encode())], lambda _: None)
    with pytest.raises(UserError, match="SHA256SUMS, line 1: is none of a list"):
        pull(url, tmp_path / "back")
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize("text", [b"", b"\xff", b"0  a\n", b"%s  a\n%s  a\n" % (b"0" * 64, b"0" * 64)])
def test_a_damaged_list_is_refused(text: bytes) -> None:
    with pytest.raises(UserError, match="SHA256SUMS"):
        listing.decode(text, "there")


def test_links_out_of_the_folder_are_not_followed(folder: Path, url: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link out of the folder"):
        push(folder, url)
    if url.startswith("file"):
        (folder / "link").unlink()
        push(folder, url)
        there = Path(url.removeprefix("file://")) / "config.json"
        there.unlink()
        there.symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match="no plain file"):
            pull(url, tmp_path / "back")


class Hub(MemoryFileSystem):
    """Stand-in for the hub's file system."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/")


def test_a_hub_takes_many_files_in_a_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a stand-in: what it is asked for is looked at, and a commit's files are there afterwards."""
    import huggingface_hub

    asked: list[Any] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            asked.append((name, options))

        def create_commit(self, name: str, operations: Any, commit_message: str, repo_type: str) -> None:
            asked.append(len(operations))
            for each in operations:
                source = each.path_or_fileobj
                value = source if isinstance(source, bytes) else Path(source).read_bytes()
                path = f"{'datasets/' if repo_type == 'dataset' else ''}{name}/{each.path_in_repo}"
                filesystem.pipe_file(path, value)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (filesystem, Hub._strip_protocol(url)))
    monkeypatch.setattr(remote, "_COMMIT_FILES", 3)
    filesystem = Hub()
    filesystem.pipe_file("/datasets/me/mine/.gitattributes", b"every new repository has one")
    url = "hf://datasets/me/mine"
    push(folder, url)
    repository = ("me/mine", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert asked == [repository, 1, repository, 3, repository, 1, repository, 1], "the list, files, and the list"
    pull(url, tmp_path / "back")
    assert {name: content(tmp_path / "back")[name] for name in FILES} == FILES
    with pytest.raises(UserError, match="--public"):
        open_remote("s3://bucket/name", public=True)
