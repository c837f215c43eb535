"""Libraries say nothing where they are to be quiet, and what they did before is as it was afterwards."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import datasets
import pytest
from transformers.utils import logging as of_transformers

from distill.system.quiet import quiet, quiet_datasets, quiet_transformers


def noise() -> None:
    print("printed")
    print("printed", file=sys.stderr)
    logging.getLogger("some.library").error("logged")
    warnings.warn("warned", stacklevel=1)


def test_nothing_is_said_inside_and_all_is_afterwards(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet(prints=True), quiet():
            noise()
        assert (caplog.text, *capsys.readouterr(), seen) == ("", "", "", [])
        noise()
    assert "logged" in caplog.text and len(seen) == 1 and capsys.readouterr() == ("printed\n", "printed\n")


@pytest.mark.filterwarnings("ignore:warned")
def test_output_is_kept_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        noise()
    assert capsys.readouterr() == ("printed\n", "printed\n")


@pytest.mark.filterwarnings("ignore:warned")
def test_what_fails_inside_comes_out_and_ends_the_silence(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="mine"), quiet(prints=True):
        raise ValueError("mine")
    noise()
    assert "logged" in caplog.text


@pytest.mark.parametrize("shown", [True, False])
def test_the_bars_are_off_inside_and_as_they_were_afterwards(shown: bool) -> None:
    before = datasets.are_progress_bars_disabled(), of_transformers.is_progress_bar_enabled()
    try:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        (of_transformers.enable_progress_bar if shown else of_transformers.disable_progress_bar)()
        with quiet_datasets(), quiet_transformers():
            assert datasets.are_progress_bars_disabled() and not of_transformers.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled() is not shown
        assert of_transformers.is_progress_bar_enabled() is shown
    finally:
        (datasets.disable_progress_bars if before[0] else datasets.enable_progress_bars)()
        (of_transformers.enable_progress_bar if before[1] else of_transformers.disable_progress_bar)()


def test_a_command_hears_of_errors_alone() -> None:
    code = (
        "import logging; from distill.system.quiet import quiet_command; quiet_command(); logging.basicConfig();"
        "logging.getLogger('transformers').warning('a'); logging.getLogger('bitsandbytes').error('b')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ERROR:bitsandbytes:b\n"
