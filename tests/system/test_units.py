"""Sizes and lengths of time: those of people are read, ours are written, and what is neither is refused by its key."""

from __future__ import annotations

import re

import pytest

from distill.errors import UserError
from distill.system.units import duration, parse_duration, parse_size, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20GB", 20 * 10**9),
        ("500 MB", 500 * 10**6),
        (" 1.5kB ", 1500),
        ("12GiB", 12 * 2**30),
        ("2TiB", 2 * 2**40),
        ("1tb", 10**12),
        ("3kib", 3072),
        ("7B", 7),
        ("0.25MiB", 2**18),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text, "cache.max_size") == expected


@pytest.mark.parametrize("text", ["", "20", "GB", "20G", "-1GB", "1e3MB", "1,5GB", "20GBs", "20iB", "nanGB", "5 PB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=rf"memory_limit: '{re.escape(text)}' is not a size; for example: 20GB"):
        parse_size(text, "memory_limit")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("11h30m", 41_400), ("2d", 172_800), (" 1d1s ", 86_401)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text, "train.max_time") == seconds


@pytest.mark.parametrize("text", ["", " ", "90", "1.5h", "-3m", "30m2h", "2 h", "1w"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(UserError, match=rf"train.max_time: '{re.escape(text)}' is not a length of time"):
        parse_duration(text, "train.max_time")


@pytest.mark.parametrize("written", ["12 GB", "144.8 MB", "3.17 kB", "12 bytes", "899.9 GB", "2 TB"])
def test_a_size_that_is_written_is_read_again(written: str) -> None:
    assert size(parse_size(written.replace("bytes", "B"), "key")) == written


def test_a_length_of_time_never_has_sixty_of_a_unit() -> None:
    for seconds in (59.7, 3599.9, 86_399.9, 86_400 * 2 - 0.1, 3_600 - 0.51):
        assert "60" not in duration(seconds) and " 24" not in duration(seconds)
    assert [duration(seconds) for seconds in (8.14, 81.2, 7500, 274_000)] == [
        *("8.1 s", "1 min 21 s"),
        *("2 h 05 min", "3 d 04 h"),
    ]
