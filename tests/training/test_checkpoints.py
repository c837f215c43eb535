"""Checkpoints are whole or not there, a damaged one is found, and the newest good ones stay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.training import checkpoints
from distill.training.checkpoints import DurableCheckpoints, KeepCheckpoints, is_whole, newest

CONTENT = {"state_dict": {"weight": torch.arange(1000.0)}, "step": 3}


def save(path: Path) -> Path:
    DurableCheckpoints().save_checkpoint(CONTENT, path)
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "step-00000003.ckpt")
    found = DurableCheckpoints().load_checkpoint(path)
    assert found["step"] == 3 and torch.equal(found["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_any_flipped_byte_of_a_tensor_and_any_cut_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "step-00000003.ckpt")
    content = path.read_bytes()
    begin = content.index(torch.arange(1000.0).numpy().tobytes())
    for place in range(begin, begin + 4000, 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_whole(path), place
    for length in range(0, len(content), 211):
        path.write_bytes(content[:length])
        assert not is_whole(path), length
    path.write_bytes(content)
    assert is_whole(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail]")])
def test_a_full_disk_costs_that_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """torch's writer turns the system's error into one of its own."""
    before = save(tmp_path / "step-00000003.ckpt").read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoints.torch, "save", full)
    for name in ("step-00000003.ckpt", "step-00000006.ckpt"):
        with pytest.raises(UserError, match=r"cannot be written.*GB are free.*--resume"):
            save(tmp_path / name)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("step-00000003.ckpt", before)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_reason_of_a_failed_write_is_told(tmp_path: Path) -> None:
    """torch's own writer does not tell it."""
    path = tmp_path / "step-00000003.ckpt"
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device; .* are free\)"):
        DurableCheckpoints().save_checkpoint({"state_dict": {"weight": torch.zeros(10**5)}}, path)


def test_damaged_ones_neither_count_nor_stand_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two whole ones are there at any time, so that one more that is damaged costs no training."""
    for step in (1, 3, 6, 9):
        save(tmp_path / f"step-{step:08}.ckpt")
    for step in (6, 9):
        (tmp_path / f"step-{step:08}.ckpt").write_bytes(b"damaged")
    assert newest(tmp_path) == tmp_path / "step-00000003.ckpt"
    assert capsys.readouterr().out.count("damaged; going back") == 2
    keep = KeepCheckpoints(tmp_path, every_steps=1, keep=2)
    trainer: Any = SimpleNamespace(is_global_zero=True, save_checkpoint=lambda path, weights_only: save(path))
    keep.on_train_start(trainer, SimpleNamespace(steps_begun=3))
    for step, stay in [(4, (3, 4, 6, 9)), (7, (4, 7, 9)), (9, (7, 9))]:
        keep.on_train_end(trainer, SimpleNamespace(steps_begun=step))
        assert sorted(tmp_path.iterdir()) == [tmp_path / f"step-{number:08}.ckpt" for number in stay]
        assert newest(tmp_path) == tmp_path / f"step-{step:08}.ckpt"
        capsys.readouterr()
    assert all(is_whole(path) for path in tmp_path.iterdir())


def test_of_damaged_ones_alone_nothing_begins_anew(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    (tmp_path / "step-00000006.ckpt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        newest(tmp_path)
