"""Bad rows are refused all together, or left out and counted; a row that was there before is left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_bad_rows_are_told_together_or_left_out_and_counted(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", cache={"max_samples": 8})
    good = (world.folder / "corpus.jsonl").read_text().splitlines()
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*good[:20], '{"text": 3}', "{", *good[20:], good[0]]))
    own = ["cache-teacher", file, "--corpus.path", path]
    distill(*own).refused("2 of 43 rows", "row 21", "row 22", "not JSON", "corpus.bad_rows skip")
    assert not (tmp_path / "run/cache").exists()
    out = distill(*own, "--corpus.bad_rows", "skip").done().out
    assert "40 documents (" in out and "3 rows left out: 1 column '…' is int, not text, 1 not JSON" in out
    manifest = json.loads((tmp_path / "run/cache/manifest.json").read_text())
    assert manifest["made_with"]["rows left out"].endswith("1 exact duplicate")
    assert "nothing to do" in distill("cache-teacher", file).done().out, "it is the cache of the good rows alone"
