"""A teacher of the user's own makes a cache of its own answers, and a changed file is another teacher."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.cache.reading.reader import CacheReader

README = Path(__file__).resolve().parents[2] / "teachers" / "README.md"


def entropy(cache: Path) -> float:
    reader = CacheReader(cache, "train")
    return sum(float(reader[number].entropy_N.mean()) for number in range(len(reader)))


@pytest.mark.usefixtures("one_thread")
def test_the_readmes_teacher(world: Any, distill: Any, tmp_path: Path) -> None:
    source = re.search(r"```python\n(from dataclasses.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert source is not None
    (tmp_path / "mine.py").write_text(source[1])
    file = world.write(tmp_path / "my.yaml", cache={"max_samples": 4, "held_out_samples": 1})
    distill("cache-teacher", file, "--run_dir", tmp_path / "plain").done()
    own = ["cache-teacher", file, "--teacher.class_path", f"{tmp_path}/mine.py:Sharper"]
    distill(*own).done()
    assert entropy(tmp_path / "run/cache") < entropy(tmp_path / "plain/cache")
    (tmp_path / "mine.py").write_text("# a remark\n" + source[1])
    assert "nothing to do" in distill(*own).done().out
    distill(*own, "--teacher.options", "{sharpness: 2.0}").refused("teacher")
    (tmp_path / "mine.py").write_text(source[1].replace("scale=self.sharpness", "scale=1.1 * self.sharpness"))
    assert not [name for name in sys.modules if name.startswith("_plugin_mine")]
    distill(*own).refused("teacher")
