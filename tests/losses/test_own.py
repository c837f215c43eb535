"""A divergence of the user's own: found by name, tried before it is used, and blamed by its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distill.errors import UserError
from distill.losses.divergences import forward_kl
from distill.losses.objective import check_divergence, make_divergence

ROOT = Path(__file__).resolve().parents[2]
SCHEMES = ("varopt", "random", "top_k", "hidden")
HEAD = "import torch\n\n\ndef mine(logits, target):\n"
FAULTS = {
    "return logits.logsumexp(-1).mean()": "return a tensor [6]",
    "return 3": "returns int of 6 positions",
    "return logits.logsumexp(-1) / 0": "not finite",
    "return logits.detach().logsumexp(-1)": "no gradient",
    "return torch.ones(len(logits), requires_grad=True) + 0": "gradient in the student's logits is missing",
    "return logits.logsumexp(-1) - logits.mean()": "depends on the other positions",
    "return logits.logsumexp(-1) + target.nonsense": "mine.py, line 5",
    "logits.data.mul_(2); return logits.logsumexp(-1)": "writes over the logits",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_function_that_is_no_divergence_is_refused(body: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"{HEAD}    {body}\n")
    with pytest.raises(UserError, match=re.escape(FAULTS[body])) as error:
        check_divergence(f"{tmp_path}/mine.py:mine", "varopt")
    assert "loss.divergence" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ours_pass_as_someone_elses(scheme: str) -> None:
    check_divergence("distill.losses.divergences:forward_kl", scheme)
    logits_NV = torch.randn(3, 5)
    own = make_divergence("distill.losses.divergences:cross_entropy")
    assert own == make_divergence("distill.losses.divergences:cross_entropy") != forward_kl
    assert callable(own) and logits_NV.shape == (3, 5)


def test_a_name_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"{HEAD}    return logits.logsumexp(-1)\n")
    with pytest.raises(UserError, match="did you mean 'mine'"):
        make_divergence(f"{tmp_path}/mine.py:mien")


def test_the_readmes_function_is_one_and_trains(
    world: object, distill: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "distill" / "training" / "README.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(import torch\n\n\ndef focal_kl.*?)```", text, re.DOTALL)
    assert source is not None
    (tmp_path / "mine.py").write_text(source[1])
    monkeypatch.chdir(tmp_path)
    file = world.write(tmp_path / "my.yaml")  # type: ignore[attr-defined]
    options = ["--cache.max_samples", 8, "--train.max_steps", 2]
    distill("cache-teacher", file, *options).done()  # type: ignore[operator]
    own = ["--loss.divergence", "mine.py:focal_kl"]
    distill("train-student", file, *options, *own).done()  # type: ignore[operator]
    again = distill("train-student", file, *options, *own).done()  # type: ignore[operator]
    assert "nothing to do" in again.out
    (tmp_path / "mine.py").write_text(source[1].replace("missing_N.detach() *", "0.5 *"))
    import sys

    for name in [name for name in sys.modules if name.startswith("_plugin_mine")]:
        del sys.modules[name]
    distill("train-student", file, *options, *own).refused("was trained with other settings", "loss")  # type: ignore
