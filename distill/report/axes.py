"""Geometry of charts: scales, round ticks, labels that keep clear of one another, and SVG elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

FONT = 12.0
"""Height of a chart's letters, in units of its view box."""


@dataclass(frozen=True)
class Scale:
    """A map of values from `low` to `high` onto coordinates from `start` to `end`. Others go to the nearer end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about so many round numbers. The first is not above `low` and the last not below `high`."""
    if not high - low > max(1e-300, 1e-9 * abs(low), 1e-9 * abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, 20, … from not above `low` to not below `high`, both above 0; or powers of 10."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if math.log10(high / low) < 2.5:
        ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        first = max((tick for tick in ticks if tick <= low * 1.0001), default=ticks[0])
        last = min((tick for tick in ticks if tick >= high * 0.9999), default=ticks[-1])
        return [tick for tick in ticks if first <= tick <= last]
    step = math.ceil(len(decades) / 8)
    return [10.0**decade for decade in range(decades[0], decades[-1] + step, step)]


def tick_text(value: float, ticks: Sequence[float], percent: bool = False) -> str:
    """Return a tick's number, with as many digits as the distance to its neighbours needs."""
    if percent:
        return f"{100 * value:.6g}\u00a0%".replace("-", "\u2212")
    most = max(map(abs, ticks))
    if not most:
        return "0"
    step = min((b - a for a, b in pairwise(ticks)), default=most)
    if most >= 1e7 or most < 1e-4:
        return _with_exponent(value, math.ceil(math.log10(most / step) + 1e-9))
    if abs(value) >= 10_000 and all(tick % 1000 == 0 for tick in ticks):
        return f"{value / 1000:,.0f}k"
    digits = max(0, min(9, -math.floor(math.log10(step) + 1e-9)))
    if any(abs(round(tick, digits) - tick) > 1e-3 * step for tick in ticks):  # steps of 0.25
        digits += 1
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def log_tick_text(value: float) -> str:
    """Return the text of a tick on a logarithmic scale: 0.05, 1,000, 1e12."""
    return f"{value:,.6g}" if 1e-4 <= value < 1e7 else _with_exponent(value, 0)


def _with_exponent(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{min(digits, 9)}e}".split("e")
    short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{short}e{int(exponent)}".replace("-", "\u2212") if value else "0"


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move the places as little as possible, so that neighbours are `gap` apart, between `low` and `high`."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    result = list(places)
    least = low
    for index in order:
        result[index] = least = max(result[index], least)
        least += gap
    most = high
    for index in reversed(order):
        result[index] = most = min(result[index], most)
        most -= gap
    return result


def shortened(name: str, most: int) -> str:
    """Return a name of at most so many letters: its beginning and its end, which tell names from one another."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-((most - 1) // 2) :]}"


def width_of(text: str) -> float:
    """Return the approximate width of a drawn text, for bold letters of a wide font: rather too much."""
    return 0.67 * FONT * len(text)


def element(name: str, content: str = "", **attributes: str | float) -> Markup:
    """Return an SVG element. `class_` is the attribute class, `_` in a name stands for `-`, and numbers are rounded."""
    parts = [Markup("<"), name]
    for key, value in attributes.items():
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text))
    parts.append(Markup(">{}</{}>").format(content, name) if content else Markup("/>"))
    return Markup("").join(escape(part) for part in parts)


def drawing(width: float, height: float, label: str, content: list[Markup]) -> Markup:
    """Return the whole chart, as wide as its place. `label` describes it to readers who do not see it."""
    box = f"0 0 {width:g} {height:g}"
    return element("svg", Markup("").join(content), viewBox=box, role="img", aria_label=label, class_="chart")
