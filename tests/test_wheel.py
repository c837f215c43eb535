"""The wheel has all that it needs, and leaves alone what an environment already has."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own wheel, built from a copy, since setuptools builds in the folder of the source."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    tracked = ["pyproject.toml", "README.md", "LICENSE", "distill", "teachers", "students"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in tracked), str(source)], check=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(made), str(source)], check=True)
    (found,) = made.glob("*.whl")
    return found


def stub(folder: Path, name: str, version: str) -> None:
    """Write a wheel of an empty package."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: signatures\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            file.writestr(path, text)


def test_it_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = (".py", ".jinja", ".css", ".json", ".csv", ".typed")
    rooms = [ROOT / room for room in ("distill", "teachers", "students")]
    expected = {
        path.relative_to(ROOT)
        for room in rooms
        for path in room.rglob("*")
        if path.suffix in data or path.name == "py.typed"
    }
    assert names == expected


def test_a_torch_that_is_there_stays(wheel: Path, tmp_path: Path) -> None:
    tomllib: Any = pytest.importorskip("tomllib")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for text in wanted:
        name = Requirement(text).name
        for version in ("5000.0",) if name != "torch" else ("2.8.0", "5000.0"):
            stub(stubs, name, version)
    venv.create(tmp_path / "fresh", with_pip=False)
    python = tmp_path / "fresh" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    offline = ["install", "-q", "--no-index", "--find-links", str(stubs)]
    subprocess.run([*pip, *offline, "torch==2.8.0"], check=True)
    subprocess.run([*pip, *offline, str(wheel)], check=True)
    listed = subprocess.run([*pip, "list", "--format", "freeze"], check=True, capture_output=True, text=True).stdout
    found = dict(line.split("==") for line in listed.split())
    assert found["torch"] == "2.8.0" and found["transformers"] == "5000.0"
    helps = subprocess.run([tmp_path / "fresh" / "bin" / "distill", "--help"], check=True, capture_output=True)
    assert b"cache-teacher" in helps.stdout
