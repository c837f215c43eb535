"""The figures of a comparison with a teacher: their names, the better direction, and their format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill.report.numbers import SPACE, Format, nats, number, share

MODELS = ("teacher", "before", "student", "control")
"""Models in the order of columns: `before` is the student before training, `control` is trained on the text alone."""

NAMES = {"before": "before training"}
"""Names on the page, for models that are not shown by their own."""


@dataclass(frozen=True)
class Metric:
    """One figure of a model."""

    key: str
    name: str
    unit: str
    better: Literal["lower", "higher", ""]
    form: Format
    meaning: str

    @property
    def heading(self) -> str:
        """The name with an arrow in the better direction."""
        return with_arrow(self.name, self.better)


METRICS = (
    Metric("nll", "NLL", "nats/token", "lower", nats, "negative log-likelihood of the true next token"),
    Metric("perplexity", "perplexity", "", "lower", number, "e to the power of the NLL"),
    Metric("bits_per_byte", "bits per byte", "", "lower", nats, "the NLL a byte of text: compares tokenizers too"),
    Metric(
        "kl",
        "KL from teacher",
        "nats/token",
        "lower",
        nats,
        "KL(teacher ‖ model): what is lost when the model stands in for the teacher; 0: the same distribution",
    ),
    Metric(
        "reverse_kl",
        "reverse KL",
        "nats/token",
        "lower",
        nats,
        "KL(model ‖ teacher): large where the model says what the teacher would not",
    ),
    Metric("jsd", "JSD", "nats/token", "lower", nats, "Jensen-Shannon divergence, between 0 and ln 2 = 0.693"),
    Metric("top1_agreement", "top-1 agreement", "", "higher", share, "the likeliest token is the teacher's"),
    Metric(
        "top5_agreement",
        "top-5 agreement",
        "",
        "higher",
        share,
        "the teacher's five likeliest tokens that are among the model's five",
    ),
    Metric(
        "acceptance",
        "acceptance",
        "",
        "higher",
        share,
        "of the tokens that the model drafts, those the teacher would accept in speculative decoding",
    ),
    Metric("ece", "calibration error", "ECE", "lower", share, "expected distance of confidence from accuracy"),
    Metric("confidence_gap", "confidence gap", "", "", share, "mean confidence minus accuracy; above 0: too sure"),
)

ARROWS_MEAN = "↓ lower is better, ↑ higher is better."

BY_KEY = {metric.key: metric for metric in METRICS}


def with_arrow(name: str, better: str) -> str:
    """Return the name with an arrow in the better direction."""
    return name + {"lower": f"{SPACE}↓", "higher": f"{SPACE}↑", "": ""}[better]


def model_name(model: str) -> str:
    """Return a model's name on the page."""
    return NAMES.get(model, model)


def reading_of(test: Mapping[str, Any], better: str) -> str:
    """Return the result of a test of student minus control: `better`, `worse`, `not told apart` or `not tested`.

    Better or worse needs an interval without 0 and p below 0.05, as far as there are any.
    """
    if "interval" not in test and "p" not in test:
        return "not tested"
    low, high = test.get("interval", (test["difference"], test["difference"]))
    if not (low > 0 or high < 0) or not test.get("p", 0.0) < 0.05:  # also where one of them is not a number
        return "not told apart"
    return "better" if (high < 0) == (better == "lower") else "worse"
