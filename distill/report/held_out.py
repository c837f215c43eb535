"""The held-out text that the figures come from, in words: its amount, its documents, and the intervals' meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.report.numbers import number, size
from distill.targets.kl_name import kl_qualifier

_UNITS = {"samples": "samples", "tokens": "tokens", "bytes": ""}


def about_amount(text: Mapping[str, Any]) -> str:
    """Say how much text was measured; empty if nothing is known of it."""
    parts = [f"{number(text[key])} {unit}" if unit else size(text[key]) for key, unit in _UNITS.items() if key in text]
    if not parts:
        return ""
    documents = text.get("documents")
    source = "" if documents is None else f", from {number(documents)} document{'s' if documents != 1 else ''}"
    return f"Measured on {', '.join(parts)} of held-out text{source}."


def kl_scope(text: Mapping[str, Any]) -> str:
    """Return the vocabulary of the evaluation's KL, if it is not the teacher's whole one: " over …" or empty."""
    return " over the student's tokens alone" if "dropped_mass" in text else ""


def training_kl(experiment: Mapping[str, Any]) -> str:
    """Return the ways in which the KL that was measured while training is another than KL(teacher ‖ student).

    `experiment` is the experiment file as evaluation.json has it; nothing is known before there is one.
    """
    cache, student = experiment.get("cache", {}), experiment.get("student", {})
    trimmed = student.get("vocabulary", "full") != "full"
    scheme, entries = cache.get("scheme", ""), cache.get("entries", 0)
    return kl_qualifier(scheme, entries, cache.get("temperature", 1), trimmed=trimmed)


def about_intervals(text: Mapping[str, Any]) -> str:
    """Say how the intervals were made."""
    if "resampled_documents" in text:
        return f"Ranges are 95 % intervals, from resampling {number(text['resampled_documents'])} documents."
    if "resampled_samples" in text:
        return (
            f"Ranges are 95 % intervals, from resampling {number(text['resampled_samples'])} samples, as there are too "
            "few documents to resample: they speak of text like these documents alone."
        )
    return "Ranges are 95 % intervals."
