"""The constraints can be installed: every declared package has one version that its own bounds allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.13")


def pins(python: str) -> dict[str, list[str]]:
    """Return the pinned versions of each package on a Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            found.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    return found


def declared() -> list[Requirement]:
    tomllib: Any = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("python", PYTHONS)
def test_a_package_has_one_version(python: str) -> None:
    assert {name: versions for name, versions in pins(python).items() if len(versions) != 1} == {}


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_declared_is_pinned_within_its_bounds(python: str) -> None:
    found = pins(python)
    wrong = [
        str(package)
        for package in declared()
        if not any(package.specifier.contains(version) for version in found.get(canonicalize_name(package.name), []))
    ]
    assert wrong == []
