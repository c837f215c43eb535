"""A command that finds everything done needs neither Lightning nor bitsandbytes, which take seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("lightning", "bitsandbytes", "lm_eval", "scipy", "torch._dynamo")
LOOK = "import json, sys, {module}; print(json.dumps([name for name in {slow} if name in sys.modules]))"


@pytest.mark.parametrize("recipe", ["cache_teacher", "train_student"])
def test_a_recipe_imports_nothing_that_only_work_needs(recipe: str) -> None:
    code = LOOK.format(module=f"distill.recipes.{recipe}", slow=SLOW)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
