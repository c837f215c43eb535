"""Numbers are written as people read them, and never lie about what they round."""

from __future__ import annotations

import math

import pytest

from distill.report import numbers
from distill.report.numbers import SPACE, Format


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (numbers.number, 3.17446, "3.174"),
        (numbers.number, 44.000108, "44.00"),
        (numbers.number, 848.69, "848.7"),
        (numbers.number, 1203.4, "1,203"),
        (numbers.number, 12_184_567.8, "1.22e7"),
        (numbers.number, 0.016146, "0.0161"),
        (numbers.number, -0.2885, "−0.288"),
        (numbers.number, 0.0, "0"),
        (numbers.number, 4080, "4,080"),
        (numbers.number, math.nan, "not a number"),
        (numbers.number, -math.inf, "−∞"),
        (numbers.nats, 12.93976, "12.940"),
        (numbers.nats, 3.0, "3.000"),
        (numbers.nats, math.inf, "∞"),
        (numbers.share, 0.13971, "14.0 %"),
        (numbers.share, 0.0012255, "0.12 %"),
        (numbers.share, 0.0, "0.0 %"),
        (numbers.share, -0.0223, "−2.2 %"),
        (numbers.whole_share, 0.42102, "42 %"),
        (numbers.whole_share, 0.0421, "4.2 %"),
        (numbers.count, 134_515_008, "134.5 M"),
        (numbers.count, 7_615_616_512, "7.62 B"),
        (numbers.count, 512, "512"),
        (numbers.size, 144_811_000, "144.8 MB"),
        (numbers.size, 12, "12 bytes"),
        (numbers.times, 2.13, "2.1×"),
        (numbers.times, 0.47, "0.47×"),
        (numbers.duration, 8.14, "8.1 s"),
        (numbers.duration, 59.7, "1 min 00 s"),
        (numbers.duration, 81.2, "1 min 21 s"),
        (numbers.duration, 3599.9, "1 h 00 min"),
        (numbers.duration, 7500, "2 h 05 min"),
        (numbers.duration, 274_000, "3 d 04 h"),
        (numbers.energy, 8123.0, "2.26 Wh"),
        (numbers.probability, 0.0002, "= 0.0002"),
        (numbers.probability, 0.61, "= 0.61"),
        (numbers.probability, 1e-6, "< 0.0001"),
        (numbers.edge, 0.5, "0.5"),
        (numbers.edge, math.inf, "∞"),
    ],
)
def test_a_number_is_written(form: Format, value: float, text: str) -> None:
    assert form(value).replace(SPACE, " ") == text


def test_intervals_name_a_unit_once() -> None:
    assert numbers.interval([3.12, 3.23], numbers.nats) == "3.120–3.230"
    assert numbers.interval([0.143, 0.148], numbers.share).replace(SPACE, " ") == "14.3–14.8 %"
    assert numbers.interval([-0.31, -0.27], numbers.nats).replace(SPACE, " ") == "−0.310 to −0.270"
    assert numbers.interval([9e5, 2e6], numbers.size).replace(SPACE, " ") == "900 kB–2 MB"
    assert numbers.with_sign("0.29") == "+0.29"
    assert numbers.with_sign("−0.29") == "−0.29"
