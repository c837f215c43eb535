"""Numbers as people read them: rounded, with units, with a true minus sign."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from distill.system import units
from distill.system.units import three_or_four_digits

SPACE = "\u00a0"
"""Space between a number and its unit, where no line may break."""
MINUS = "\u2212"

Format = Callable[[float], str]


def number(value: float) -> str:
    """Write about four significant digits: 3.174, 44.00, 1,234, 1.22e7."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    size = abs(value)
    if size >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return _signed(f"{mantissa}e{int(exponent)}")
    if size >= 999.95 or value == int(value):
        return _signed(f"{value:,.0f}")
    digits = 1 if size >= 99.995 else 2 if size >= 9.9995 else 3
    return _signed(f"{value:.{digits}f}" if size >= 0.0995 else f"{value:.3g}")


def nats(value: float) -> str:
    """Write three decimals: 3.174. From 1,000 on, where they say nothing, write as `number` does."""
    return number(value) if not abs(value) < 999.95 else _signed(f"{value:.3f}")


def share(value: float) -> str:
    """Write a share of 1 in percent: 14.0 %, 0.12 %."""
    if not math.isfinite(value):
        return number(value)
    percent = 100 * value
    text = f"{percent:.1f}" if abs(percent) >= 0.995 or percent == 0 else f"{percent:.2g}"
    return f"{_signed(text)}{SPACE}%"


def whole_share(value: float) -> str:
    """Write a share of 1 in whole percent, for running text; with digits if it is below 10 %."""
    return (
        share(value) if abs(value) < 0.0995 or not math.isfinite(value) else f"{_signed(f'{100 * value:.0f}')}{SPACE}%"
    )


def count(value: float) -> str:
    """Write a number of parameters: 134.5 M, 7.62 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{three_or_four_digits(value / size)}{SPACE}{unit}"
    return number(value)


def size(value: float) -> str:
    """Write bytes: 269.1 MB."""
    return units.size(value).replace(" ", SPACE)


def rate(value: float) -> str:
    """Write tokens a second, without the unit, which stands in the row's head."""
    return f"{value:,.0f}" if abs(value) >= 99.5 else number(value)


def times(value: float) -> str:
    """Write a factor: 2.1×."""
    return f"{value:.0f}×" if abs(value) >= 19.5 else f"{value:.2g}×" if abs(value) < 0.95 else f"{value:.1f}×"


def duration(seconds: float) -> str:
    """Write wall time: 8.1 s, 1 min 21 s, 2 h 05 min, 3 d 04 h; a line may break between its two units."""
    return re.sub(r"(?<=\d) ", SPACE, units.duration(seconds))


def energy(joules: float) -> str:
    """Write energy in watt hours, as on bills: 3.42 Wh."""
    hours = joules / 3600
    value, unit = (hours / 1000, "kWh") if hours >= 1000 else (hours, "Wh")
    return f"{three_or_four_digits(value)}{SPACE}{unit}"


def probability(value: float) -> str:
    """Write a p-value with its sign of relation: `= 0.012`, `< 0.0001`."""
    return "< 0.0001" if value < 0.0001 else f"= {value:.4f}" if value < 0.001 else f"= {value:.2g}"


def edge(value: float) -> str:
    """Write an edge of a bin as short as possible: 0, 0.5, 16."""
    return f"{value:g}" if math.isfinite(value) else number(value)


def with_sign(text: str) -> str:
    """Return the formatted number with a plus sign if it has no minus sign."""
    return text if text.startswith((MINUS, "not")) else f"+{text}"


def interval(ends: Sequence[float], form: Format) -> str:
    """Write an interval: `3.12–3.23`, `−0.31 to −0.27`. A unit that both ends share stands once."""
    first, last = map(form, ends)
    unit = last.partition(SPACE)[2]
    if unit and first.endswith(f"{SPACE}{unit}"):
        first = first.removesuffix(f"{SPACE}{unit}")
    signed = any(text.startswith((MINUS, "+")) for text in (first, last))
    return f"{first}{SPACE}to {last}" if signed or not last[:1].isdigit() else f"{first}–{last}"


def _signed(text: str) -> str:
    return text.replace("-", MINUS, 1) if text.startswith("-") else text
