"""Charts are valid SVG whose every point lies inside, whatever the values are."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from distill.report.axes import apart, log_ticks, round_ticks, shortened, tick_text
from distill.report.charts import Bar, Group, Line, bar_chart, binned_chart, line_chart
from distill.report.numbers import number, share

SVG = "{http://www.w3.org/2000/svg}"
NUMBER = r"-?\d+(?:\.\d+)?"


def parsed(chart: Markup) -> ElementTree.Element:
    root = ElementTree.fromstring(str(chart))
    assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label")
    return root


def spots(root: ElementTree.Element) -> Iterator[tuple[float, float]]:
    """Every point that the chart draws: of paths, dots, bars and texts."""
    for each in root.iter():
        for x, y in (("x", "y"), ("cx", "cy")):
            if each.get(x) is not None:
                yield float(each.get(x, "")), float(each.get(y, ""))
                if each.tag == "rect":
                    yield float(each.get("x", "")) + float(each.get("width", "")), float(each.get("y", ""))
        y = 0.0
        for letter, numbers in re.findall(rf"([MLHVv])((?:{NUMBER} ?)+)", each.get("d", "")):
            found = [float(value) for value in re.findall(NUMBER, numbers)]
            if letter in "ML":
                y = found[1]
                yield found[0], found[1]
            elif letter == "H":
                yield found[0], y
            elif letter == "V":
                y = found[0]


def assert_inside(chart: Markup) -> None:
    root = parsed(chart)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    outside = [(x, y) for x, y in spots(root) if not (-0.5 <= x <= width + 0.5 and -0.5 <= y <= height + 0.5)]
    assert outside == [], (width, height)


def lines_of(*values: Sequence[float]) -> list[Line]:
    names = ("student", "control", "teacher")
    return [Line(names[i], names[i], [(float(10 * s), v) for s, v in enumerate(each)]) for i, each in enumerate(values)]


VALUES = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, max_size=8), min_size=1, max_size=3))
def test_lines_of_anything_stay_inside(values: list[list[float]]) -> None:
    chart = line_chart(lines_of(*values), "KL over steps", "steps", "nats/token", number)
    if any(math.isfinite(value) for each in values for value in each):
        assert_inside(chart)
    else:
        assert chart == ""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(VALUES, st.none() | VALUES), max_size=6), st.none() | st.floats(0, 1))
def test_bars_of_anything_stay_inside(values: list[tuple[float, float | None]], chance: float | None) -> None:
    bars = [Bar("student", "student", value, "1", None if error is None else abs(error)) for value, error in values]
    chart = bar_chart([Group("arc_easy", bars, chance, "chance")], "scores", "score", share)
    if any(math.isfinite(value) and value >= 0 for value, _ in values):
        assert_inside(chart)
    else:
        assert chart == ""


def test_one_point_is_a_dot() -> None:
    root = parsed(line_chart(lines_of([3.2]), "KL", "steps", "nats", number))
    assert len(root.findall(".//circle")) == 1
    assert root.findall(".//path[@class='line']") == []


def test_a_line_breaks_where_a_value_is_not_finite() -> None:
    root = parsed(line_chart(lines_of([3.0, 2.5, math.nan, 2.0, math.inf, 1.5, 1.4]), "KL", "steps", "nats", number))
    line = root.find(".//path[@class='line']")
    assert line is not None and line.get("d", "").count("M") == 2  # the third piece is the dot between the gaps
    assert len(root.findall(".//circle")) == 5


def test_nothing_is_no_chart() -> None:
    assert line_chart([], "KL", "steps", "nats", number) == ""
    assert line_chart(lines_of([], [math.nan]), "KL", "steps", "nats", number) == ""
    assert bar_chart([], "scores", "score", share) == ""
    assert binned_chart(["0", "1"], lines_of([math.nan]), [1.0], "KL", "entropy", "nats", number) == ""


def test_higher_values_are_drawn_higher_and_further() -> None:
    root = parsed(line_chart(lines_of([1.0, 2.0, 4.0]), "KL", "steps", "nats", number))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter("circle")]
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    (_, first), (_, second), (_, third) = dots
    assert first > second > third and math.isclose(second - third, 2 * (first - second), abs_tol=0.05)


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("teacher", "teacher", 0.6, "60 %", 0.05), Bar("student", "student", 0.3, "30 %")]
    root = parsed(bar_chart([Group("piqa", bars, 0.5, "chance 50 %")], "scores", "score", share))
    first, second = (float(bar.get("width", "")) for bar in root.findall(".//rect[@class='bar']"))
    assert math.isclose(first, 2 * second, abs_tol=0.05)
    assert len(root.findall(".//path[@class='whisker']")) == 1
    assert len(root.findall(".//path[@class='reference']")) == 1


def test_charts_alike_have_one_scale() -> None:
    groups = [Group(str(v), [Bar("student", "student", v, share(v))]) for v in (0.1, 0.9)]
    one, other = (parsed(bar_chart([group], "scores", "score", share, groups)) for group in groups)
    widths = [float(root.findall(".//rect[@class='bar']")[0].get("width", "")) for root in (one, other)]
    assert math.isclose(widths[1], 9 * widths[0], rel_tol=0.01)


def test_values_far_apart_get_a_logarithmic_scale() -> None:
    near, far = (str(line_chart(lines_of(v), "KL", "steps", "nats", number)) for v in ([1.0, 19.0], [1.0, 300.0]))
    assert "log scale" in far and "log scale" not in near


def test_bins_stand_between_their_edges() -> None:
    chart = binned_chart(["0", "1", "∞"], lines_of([2.0, 1.0]), [0.75, 0.25], "KL by entropy", "nats", "nats", number)
    chart_of_indices = binned_chart(
        ["0", "1", "∞"], [Line("student", "student", [(0.0, 2.0), (1.0, 1.0)])], [0.75, 0.25], "KL", "nats", "y", number
    )
    assert_inside(chart)
    root = parsed(chart_of_indices)
    ticks = {text.text: float(text.get("x", "")) for text in root.iter("text") if text.get("text-anchor") == "middle"}
    first, second = (float(dot.get("cx", "")) for dot in root.iter("circle"))
    bars = root.findall(".//rect[@class='share']")
    assert ticks["0"] < first < ticks["1"] < second < ticks["∞"]
    assert math.isclose(float(bars[0].get("height", "")), 3 * float(bars[1].get("height", "")), abs_tol=0.05)


def test_names_in_charts_are_escaped() -> None:
    evil = '<script>"&'
    for chart in (
        line_chart([Line(evil, "r0", [(1.0, 2.0)])], evil, evil, evil, number),
        bar_chart([Group(evil, [Bar(evil, "r0", 0.5, evil)], 0.25, evil)], evil, evil, share),
    ):
        assert parsed(chart).get("aria-label") == evil
        assert "<script" not in chart


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_hold_the_values_between_them(low: float, span: float) -> None:
    ticks = round_ticks(low, low + span)
    assert ticks[0] <= low + 1e-6 * span and ticks[-1] >= low + span - 1e-6 * span
    assert 2 <= len(ticks) <= 12 and ticks == sorted(ticks)
    for tick in ticks:
        said = tick_text(tick, ticks).replace(",", "").replace("\u2212", "-").replace("k", "e3")
        assert math.isclose(float(said), tick, rel_tol=1e-6, abs_tol=1e-6 * span)


@given(st.floats(1e-6, 1e6), st.floats(20, 1e8))
def test_logarithmic_ticks_hold_the_values_between_them(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks[0] <= low * 1.001 and ticks[-1] >= low * factor * 0.999
    assert len(ticks) <= 16


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8))
def test_labels_keep_apart(places: list[float]) -> None:
    moved = apart(places, 15.0, 0.0, 200.0)
    assert all(-1e-9 <= place <= 200 + 1e-9 for place in moved)
    ordered = sorted(moved)
    assert all(b - a >= 15.0 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert sorted(range(len(places)), key=lambda i: (places[i], moved[i])) == sorted(
        range(len(moved)), key=lambda i: moved[i]
    )


def test_long_names_keep_both_ends() -> None:
    assert shortened("varopt-1-50-mixed", 20) == "varopt-1-50-mixed"
    assert len(shortened("a-very-long-name-of-a-run-with-seed-1", 20)) == 20
    assert shortened("a-very-long-name-of-a-run-with-seed-1", 20).endswith("th-seed-1")
