"""Charts as SVG: lines over steps, values in bins, bars with errors. Colours come from the page, by role."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from distill.report.axes import (
    FONT,
    Scale,
    apart,
    drawing,
    element,
    log_tick_text,
    log_ticks,
    round_ticks,
    shortened,
    tick_text,
    width_of,
)
from distill.report.numbers import Format, share

WIDTH, HEIGHT = 410.0, 255.0
TOP, BOTTOM = 30.0, 42.0
MANY = 60
"""Largest number of points of a line that has a dot at each."""
LETTERS = 20
"""Letters of a name in a chart. The tables show the whole name."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: `role` gives its colour and dashes, `name` stands at its end."""

    name: str
    role: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One bar, with `error` on both sides (None means no error) and `text` at its end."""

    name: str
    role: str
    value: float
    text: str
    error: float | None = None


@dataclass(frozen=True)
class Group:
    """Bars that are compared with one another, and a `reference` value for them."""

    title: str
    bars: Sequence[Bar]
    reference: float | None = None
    reference_text: str = ""


@dataclass(frozen=True)
class _Frame:
    """The area of a chart for its values, and the format in which they are written."""

    x: Scale
    y: Scale
    ticks: Sequence[float]
    form: Format

    def tick_text(self, tick: float) -> str:
        """Return the text at a tick of y."""
        return log_tick_text(tick) if self.y.log else tick_text(tick, self.ticks, self.form is share)

    def spot(self, point: tuple[float, float]) -> tuple[float, float]:
        return self.x(point[0]), self.y(point[1])


def line_chart(lines: Sequence[Line], label: str, x_name: str, y_name: str, form: Format) -> Markup:
    """Draw lines over x from 0 on, with their names at their ends. Returns an empty chart if no point is finite.

    A line is broken where a value is not finite. Values that span more than a factor of 20 get a logarithmic scale.
    """
    lines = [line for line in lines if _finite(line.points)]
    if not lines:
        return Markup("")
    points = [point for line in lines for point in _finite(line.points)]
    last = max(x for x, _ in points)
    frame = _frame(lines, [y for _, y in points], (min(0.0, *(x for x, _ in points)), last), form)
    ticks = [tick for tick in round_ticks(frame.x.low, frame.x.high) if frame.x.low <= tick <= frame.x.high]
    axis = [_text(frame.x(tick), HEIGHT - BOTTOM + 16, tick_text(tick, ticks), "middle") for tick in ticks]
    name = y_name + (", log scale" if frame.y.log else "")
    return _drawn(lines, frame, label, x_name, [*_grid(frame, name), *axis])


def binned_chart(
    edges: Sequence[str],
    lines: Sequence[Line],
    shares: Sequence[float],
    label: str,
    x_name: str,
    y_name: str,
    form: Format,
) -> Markup:
    """Draw values of bins, all of one width. A point's x is its bin's index; `edges` are one more than the bins.

    `shares` of the positions in each bin stand as pale bars behind. Returns an empty chart if no value is finite.
    """
    lines = [line for line in lines if _finite(line.points)]
    if not lines:
        return Markup("")
    values = [0.0, *(y for line in lines for _, y in _finite(line.points))]
    frame = _frame(lines, values, (-0.5, len(edges) - 1.5), form)
    content = [*_share_bars(frame, shares), *_grid(frame, y_name)]
    room = (frame.x.end - frame.x.start) / (len(edges) - 1)
    every = math.ceil((width_of("0" * max(map(len, edges))) + 4) / room)
    for index in range(0, len(edges), every):
        content.append(_text(frame.x(index - 0.5), HEIGHT - BOTTOM + 16, edges[index], "middle"))
    return _drawn(lines, frame, label, x_name, content)


def bar_chart(
    groups: Sequence[Group], label: str, x_name: str, form: Format, alike: Sequence[Group] | None = None
) -> Markup:
    """Draw horizontal bars from 0, in groups with a title each. Values that are negative or not finite are left out.

    `alike` are the groups of all charts that share one scale, including these.
    """
    groups = _drawable(groups)
    if not groups:
        return Markup("")
    every = [bar for group in _drawable(alike or groups) for bar in group.bars]
    left = max(width_of(shortened(bar.name, LETTERS)) for bar in every) + 8
    right = WIDTH - max(width_of(bar.text) for bar in every) - 8
    references = [
        group.reference for group in alike or groups if group.reference is not None and math.isfinite(group.reference)
    ]
    ticks = round_ticks(0.0, max([*map(_end, every), *references]), about=4)
    scale = Scale(0.0, ticks[-1], left, right)
    content: list[Markup] = []
    y = 0.0
    for group in groups:
        content += _bars(group, scale, y)
        y += 20 * len(group.bars) + 34
    content += [_text(scale(tick), y + 8, tick_text(tick, ticks, form is share), "middle") for tick in ticks]
    content.append(_text((left + right) / 2, y + 26, x_name, "middle"))
    return drawing(WIDTH, y + 32, label, content)


def _end(bar: Bar) -> float:
    return bar.value + (bar.error if bar.error is not None and math.isfinite(bar.error) else 0.0)


def _drawable(groups: Sequence[Group]) -> list[Group]:
    kept = [replace(g, bars=[bar for bar in g.bars if math.isfinite(bar.value) and bar.value >= 0]) for g in groups]
    return [group for group in kept if group.bars]


def _bars(group: Group, scale: Scale, top: float) -> list[Markup]:
    title = [element("tspan", group.title, class_="strong")]
    if group.reference_text:
        title.append(element("tspan", group.reference_text, dx=8))
    content = [element("text", Markup("").join(title), x=0, y=top + 14)]
    for index, bar in enumerate(group.bars):
        y = top + 24 + 20 * index
        end = scale(bar.value)
        shape = element("rect", x=scale.start, y=y + 2, width=end - scale.start, height=14.0, rx=1.5, class_="bar")
        elements = [element("title", f"{group.title}, {bar.name}: {bar.text}"), shape]
        elements.append(_text(scale.start - 6, y + 13, shortened(bar.name, LETTERS), "end", "named"))
        if bar.error is not None and math.isfinite(bar.error):
            low, end = scale(bar.value - bar.error), scale(bar.value + bar.error)
            whisker = f"M{low:.2f} {y + 9:.2f}H{end:.2f}M{low:.2f} {y + 5:.2f}v8M{end:.2f} {y + 5:.2f}v8"
            elements += [element("path", d=whisker, class_=each) for each in ("halo", "whisker")]
        elements.append(_text(end + 6, y + 13, bar.text, "start", "value"))
        content.append(element("g", Markup("").join(elements), class_=f"m-{bar.role}"))
    if group.reference is not None and math.isfinite(group.reference):
        x, bottom = scale(group.reference), top + 24 + 20 * len(group.bars)
        content.append(element("path", d=f"M{x:.2f} {top + 21:.2f}V{bottom:.2f}", class_="reference"))
    return content


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]


def _end_text(line: Line, form: Format) -> str:
    return f"{shortened(line.name, LETTERS)} {form(_finite(line.points)[-1][1])}"


def _frame(lines: Sequence[Line], values: Sequence[float], x_range: tuple[float, float], form: Format) -> _Frame:
    """Return scales that hold the values, with room at the right for the labels at the lines' ends."""
    low, high = min(values), max(values)
    log = low > 0 and high / low > 20
    ticks = log_ticks(low, high) if log else round_ticks(low, high)
    frame = _Frame(Scale(*x_range, 0.0, 0.0), Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, log), ticks, form)
    left = max(width_of(frame.tick_text(tick)) for tick in ticks) + 8
    right = WIDTH - max(width_of(_end_text(line, form)) for line in lines) - 12
    return replace(frame, x=Scale(*x_range, left, right))


def _drawn(lines: Sequence[Line], frame: _Frame, label: str, x_name: str, content: list[Markup]) -> Markup:
    content.append(_text((frame.x.start + frame.x.end) / 2, HEIGHT - 6, x_name, "middle"))
    for line in lines:
        content += _line(line, frame)
    return drawing(WIDTH, HEIGHT, label, [*content, *_end_labels(lines, frame)])


def _grid(frame: _Frame, name: str) -> list[Markup]:
    content = [_text(0, 12, name, "start")]
    for tick in frame.ticks:
        y = frame.y(tick)
        line = f"M{frame.x.start:.2f} {y:.2f}H{frame.x.end:.2f}"
        content.append(element("path", d=line, class_="axis" if tick == frame.ticks[0] else "grid"))
        content.append(_text(frame.x.start - 6, y + 4, frame.tick_text(tick), "end"))
    return content


def _share_bars(frame: _Frame, shares: Sequence[float]) -> list[Markup]:
    most = max([each for each in shares if math.isfinite(each)], default=0.0) or 1.0
    content = []
    for index, each in enumerate(shares):
        if math.isfinite(each):
            left, right = frame.x(index - 0.45), frame.x(index + 0.45)
            height = 0.3 * (HEIGHT - TOP - BOTTOM) * each / most
            hint = element("title", f"{share(each)} of the tokens")
            place = {"x": left, "y": HEIGHT - BOTTOM - height, "width": right - left, "height": height}
            content.append(element("rect", hint, class_="share", **place))
    return content


def _line(line: Line, frame: _Frame) -> list[Markup]:
    """Draw the line's pieces between values that are not finite, and a dot with its numbers at each point."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in line.points:
        if math.isfinite(point[0]) and math.isfinite(point[1]):
            pieces[-1].append(frame.spot(point))
        else:
            pieces.append([])
    drawn = "".join("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in piece) for piece in pieces if len(piece) > 1)
    content = [element("path", d=drawn, class_="line")] if drawn else []
    finite = _finite(line.points)
    alone = {piece[0] for piece in pieces if len(piece) == 1}
    for point in finite:
        x, y = frame.spot(point)
        if len(finite) <= MANY or point == finite[-1] or (x, y) in alone:
            hint = element("title", f"{line.name}: {frame.form(point[1])}")
            content.append(element("circle", hint, cx=x, cy=y, r=2.5 if len(finite) > 20 else 3.5, class_="dot"))
    return [element("g", Markup("").join(content), class_=f"m-{line.role}")]


def _end_labels(lines: Sequence[Line], frame: _Frame) -> list[Markup]:
    wanted = [frame.y(_finite(line.points)[-1][1]) for line in lines]
    places = apart(wanted, FONT + 3, TOP, HEIGHT - BOTTOM)
    x = frame.x.end + 8
    return [
        element("g", _text(x, y + 4, _end_text(line, frame.form), "start", "named"), class_=f"m-{line.role}")
        for line, y in zip(lines, places, strict=True)
    ]


def _text(x: float, y: float, text: str, anchor: str, class_: str = "") -> Markup:
    attributes = {"class_": class_} if class_ else {}
    return element("text", text, x=float(x), y=float(y), text_anchor=anchor, **attributes)
