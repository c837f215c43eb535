"""The schema of a run's files, checked once on reading, so that the page can rely on it."""

from __future__ import annotations

from typing import Any

from distill.errors import UserError

NUMBER, TEXT, OBJECT, FLAG = "a number", "a text", "an object", "true or false"
SPEED = "a number or null"
"""A speed; null means that the device ran out of memory."""
_TYPES: dict[str, tuple[type, ...]] = {
    NUMBER: (int, float),
    SPEED: (int, float, type(None)),
    TEXT: (str,),
    OBJECT: (dict,),
    FLAG: (bool,),
}


class Pair:
    """Spec of a list of exactly two numbers."""


def _of_models(spec: Any) -> dict[str, Any]:
    return {"teacher": spec, "before": spec, "student": spec, "control": spec}


RESAMPLED = ("resampled_documents", "resampled_samples")
"""Keys of the number of clusters behind the intervals; one of them is there."""
_BIN = {"from": NUMBER, "to": NUMBER, "positions": NUMBER, "nll": NUMBER, "kl": NUMBER}
_BIN |= {"top1_agreement": NUMBER, "acceptance": NUMBER}
_OF_SOURCE: dict[str, Any] = {
    **dict.fromkeys(("positions", "nll", "kl", "top1_agreement", "acceptance"), NUMBER),
    "source": TEXT,
    "intervals": {"*": Pair},
}
_COUNTS = {
    **dict.fromkeys(("rows", "documents", "held_out", "tokens", "learned", "longer"), NUMBER),
    "left_out": {"*": NUMBER},
}
_DIFFERENCE = {"difference": NUMBER, "interval": Pair, "p": NUMBER}
_FIDELITY = {
    **dict.fromkeys(("nll", "perplexity", "bits_per_byte", "ece", "confidence_gap", "kl", "reverse_kl", "jsd"), NUMBER),
    **dict.fromkeys(("top1_agreement", "top5_agreement", "acceptance"), NUMBER),
    "intervals": {"*": Pair},
    "by_entropy": [_BIN],
    "by_position": [_BIN],
    "by_source": [_OF_SOURCE],
}
_TASK = {
    "documents": NUMBER,
    "metric": TEXT,
    "metrics": {"*": {"value": NUMBER, "stderr": NUMBER}},
    "chance": NUMBER,
    "truncated": NUMBER,
}
_COST = {
    **dict.fromkeys(("bytes_on_disk", "weight_bytes", "peak_bytes"), NUMBER),
    "prefill": {"*": SPEED},
    "decode": {"*": SPEED},
    "rounds": {"prefill": {"*": [NUMBER]}, "decode": {"*": [NUMBER]}},
    "kv_cache": FLAG,
    **dict.fromkeys(("prompt_tokens", "new_tokens"), NUMBER),
}
_ROUND = dict.fromkeys(("round", "held_out_kl", "own_kl"), NUMBER)
_OWN_BIN = {"from": NUMBER, "to": NUMBER, "positions": NUMBER, "kl": NUMBER}
_OWN = {
    **dict.fromkeys(("kl", "ended", "repetition", "distinct_1", "distinct_2", "texts", "tokens", "answers"), NUMBER),
    **dict.fromkeys(("exact_match", "token_f1", "valid_json", "metric"), NUMBER),
    "intervals": {"*": Pair},
    "by_position": [_OWN_BIN],
}
_SEEDS = {"*": {"mean": NUMBER, "deviation": NUMBER, "values": [NUMBER]}}

EVALUATION: dict[str, Any] = {
    "parameters": _of_models(NUMBER),
    "text": dict.fromkeys(
        ("tokens", "samples", "bytes", "documents", *RESAMPLED, "dropped_mass", "left_out_samples"), NUMBER
    ),
    "corpus": {"sources": {"*": _COUNTS}},
    "fidelity": _of_models(_FIDELITY),
    "student_against_control": {"*": _DIFFERENCE},
    "benchmarks": _of_models({"*": _TASK}),
    "overlaps": {"teacher": {"*": {"documents": NUMBER, "overlapping": NUMBER}}},
    "cost": _of_models(_COST),
    "speculative": {"draft_tokens": NUMBER, "speedup": NUMBER},
    "texts": {"prompts": [TEXT], "truth": [TEXT], "teacher": [TEXT], "student": [TEXT], "control": [TEXT]},
    "rounds": [_ROUND],
    "own_texts": _of_models(_OWN),
    "seeds": _of_models(_SEEDS),
    "experiment": OBJECT,
    "versions": OBJECT,
    "machine": OBJECT,
    "fingerprints": OBJECT,
}
COST_LINE = {
    **dict.fromkeys(("phase", "began", "ended", "energy_source"), TEXT),
    **dict.fromkeys(("seconds", "peak_memory_bytes", "peak_device_bytes", "joules"), NUMBER),
}
TEXTS_LINE = {"step": NUMBER, "prompts": [TEXT], "texts": [TEXT]}
FORECAST = {"rows": [{"what": TEXT, "unit": TEXT, "forecast": NUMBER, "measured": NUMBER}]}
SEARCH = {"candidates": [{"options": OBJECT, "parameters": NUMBER, "kl": {"*": NUMBER}}], "chosen": OBJECT}
_PREDICTED = dict.fromkeys(("kl", "low", "high"), NUMBER)
PREDICTION = {"end": NUMBER, "predicted": {"*": {"*": _PREDICTED}}}
REQUIRED = {
    id(_BIN): ("from", "positions"),
    id(_OF_SOURCE): ("source", "positions"),
    id(_DIFFERENCE): ("difference",),
    id(_TASK): ("metric", "metrics"),
}
REQUIRED |= {id(COST_LINE): ("phase", "seconds"), id(EVALUATION["texts"]): ("prompts",)}
REQUIRED |= {id(SEARCH["candidates"][0]): ("options", "parameters", "kl")}
REQUIRED |= {id(TEXTS_LINE): ("step", "prompts", "texts")}
REQUIRED |= {id(_PREDICTED): ("kl", "low", "high"), id(PREDICTION): ("predicted",)}
REQUIRED |= {id(_ROUND): ("round", "held_out_kl")}
REQUIRED |= {id(_OWN): ("texts", "tokens"), id(_OWN_BIN): ("from", "positions", "kl")}
REQUIRED |= {id(FORECAST["rows"][0]): ("what", "unit"), id(_SEEDS["*"]): ("mean", "values")}


def checked(value: Any, spec: Any, where: str) -> Any:
    """Return `value` without the keys that `spec` does not name, and without nulls, which mean "not measured".

    Raises UserError that begins with `where` and names the place in `value` that has another form.
    """
    if isinstance(spec, dict):
        return _checked_object(value, spec, where)
    if isinstance(spec, list):
        if not isinstance(value, list):
            raise _damaged(where, "a list", value)
        return [checked(item, spec[0], f"{where}.{index}") for index, item in enumerate(value)]
    if spec is Pair:
        numbers = checked(value, [NUMBER], where)
        if len(numbers) != 2:
            raise _damaged(where, "a list of two numbers", value)
        return numbers
    if not isinstance(value, _TYPES[spec]) or (spec != FLAG and isinstance(value, bool)):
        raise _damaged(where, spec, value)
    return value


def _checked_object(value: Any, spec: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(where, OBJECT, value)
    missing = [key for key in REQUIRED.get(id(spec), ()) if value.get(key) is None]
    if missing:
        raise UserError(f"{where}: '{missing[0]}' is missing: the file is damaged; have it made anew")
    specs = {key: spec["*"] for key in value} if "*" in spec else spec
    return {
        key: checked(value[key], specs[key], f"{where}.{key}")
        for key in specs
        if key in value and (value[key] is not None or specs[key] is SPEED)
    }


def _damaged(where: str, expected: str, found: Any) -> UserError:
    shown = repr(found)
    shown = shown if len(shown) <= 40 else shown[:37] + "…"
    return UserError(f"{where}: expected {expected}, found {shown}: the file is damaged; have it made anew")
