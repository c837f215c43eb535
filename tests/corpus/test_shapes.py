"""Rows of every shape in use become the documents that their columns mean; others are named with what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from distill.corpus import open_corpus
from distill.corpus.conversations import Conversation
from distill.corpus.documents import faults_in, load_documents
from distill.corpus.faults import refusal
from distill.corpus.reading import find_sources
from distill.corpus.shapes import BY_NAME, NAMES, Columns, columns_to_read
from distill.errors import UserError

Write = Callable[..., str]
USER, ANSWER = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Elbe."}
PLAIN = [USER, ANSWER]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "The Elbe."}]
PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PLAIN]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def read(path: str, columns: Columns = BY_NAME) -> tuple[list[Conversation], list[str]]:
    table = load_documents(find_sources(path, None, "train", columns))
    if faults := faults_in(table, table):
        raise refusal(faults, len(table), [path])
    found = [Conversation.parse(text) if text else Conversation([]) for text in table["document"]]
    return found, [NAMES[kind] for kind in table["shape"]]


SHAPES: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = [
    ({"messages": PLAIN}, PLAIN, "conversations"),
    ({"messages": json.dumps(PLAIN)}, PLAIN, "conversations"),
    ({"messages": PARTS}, PLAIN, "conversations"),
    ({"messages": [USER, {**ANSWER, "content": ["The ", {"type": "text", "text": "Elbe."}]}]}, PLAIN, "conversations"),
    ({"conversations": SHAREGPT}, PLAIN, "ShareGPT conversations"),
    ({"conversation": SHAREGPT}, PLAIN, "ShareGPT conversations"),
    ({"conversations": json.dumps(SHAREGPT), "system": "Be brief."}, [SYSTEM, *PLAIN], "ShareGPT conversations"),
    ({"conversations": PLAIN, "text": "not this"}, PLAIN, "conversations"),
    ({"messages": SHAREGPT}, PLAIN, "ShareGPT conversations"),
    ({"prompt": "Name a river.", "completion": "The Elbe."}, PLAIN, "pairs of prompt and completion"),
    ({"prompt": "Name a river.", "completion": "The Elbe.", "label": True}, PLAIN, "pairs of prompt and completion"),
    ({"question": "Name a river.", "answer": "The Elbe.", "label": False}, PLAIN, "pairs of prompt and completion"),
    ({"messages": None, "text": None, "prompt": "Name a river.", "completion": "The Elbe.", "tools": None}, PLAIN,
     "pairs of prompt and completion"),
    ({"prompt": [USER], "completion": [ANSWER]}, PLAIN, "pairs of prompt and completion"),
    ({"prompt": [USER], "completion": "The Elbe."}, PLAIN, "pairs of prompt and completion"),
    ({"instruction": "Name a river.", "input": "", "output": "The Elbe."}, PLAIN, "pairs of prompt and completion"),
    ({"instruction": "Name", "input": "a river.", "output": "The Elbe."},
     [{"role": "user", "content": "Name\n\na river."}, ANSWER], "pairs of prompt and completion"),
    ({"instruction": "Name", "context": "a river.", "response": "The Elbe.", "category": "x"},
     [{"role": "user", "content": "Name\n\na river."}, ANSWER], "pairs of prompt and completion"),
    ({"question": "Name a river.", "answer": "The Elbe.", "system_prompt": "Be brief."}, [SYSTEM, *PLAIN],
     "pairs of prompt and completion"),
    ({"instruction": "Name a river.", "output": "The Elbe.", "history": [["Hello", "Hi"]], "system": "Be brief."},
     [SYSTEM, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, *PLAIN],
     "pairs of prompt and completion"),
    ({"messages": [SYSTEM, *PLAIN], "system": "Be brief.\n"}, [SYSTEM, *PLAIN], "conversations"),
    ({"prompt": "Name a river.", "chosen": PLAIN, "rejected": [USER]}, PLAIN, "chosen answers of preferences"),
    ({"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "No."}, PLAIN, "chosen answers of preferences"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, PLAIN, "chosen answers of preferences"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages", "name"), SHAPES)
def test_every_shape(write: Write, row: dict[str, Any], messages: list[dict[str, Any]], name: str) -> None:
    found, names = read(write("a.jsonl", [row, row]))
    assert [conversation.messages for conversation in found] == [messages] * 2
    assert names == [name] * 2


def test_a_table_gives_the_same_and_only_needed_columns_are_read(write: Write, tmp_path: Path) -> None:
    rows = [{"question": "Name a river.", "answer": "The Elbe.", "url": "x" * 99}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"))[0][0].messages == PLAIN
    assert columns_to_read(["url", "answer", "question"], Columns()) == ["answer", "question"]
    assert columns_to_read(["a", "b"], Columns()) == ["a", "b"], "so that an error can name them"


def test_a_column_that_is_null_is_as_good_as_not_there(write: Write, tmp_path: Path) -> None:
    """Tables fill in what other rows have; a row of nothing but nulls is named by its first column."""
    rows = [{"messages": None, "text": "The Elbe."}, {"messages": None, "text": "The Oder."}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (write("rows.jsonl", rows), str(tmp_path / "rows.parquet")):
        assert load_documents(find_sources(path, None, "train"))["document"] == ["The Elbe.", "The Oder."]
    with pytest.raises(UserError, match="messages are a NoneType"):
        read(write("nothing.jsonl", [{"messages": None, "text": None}]))


def test_an_answer_that_is_not_wanted_is_not_learned(write: Write) -> None:
    """A set for KTO has wanted and unwanted answers, by its label."""
    path = write("rows.jsonl", [{"prompt": "Name a river.", "completion": "Bonn.", "label": False}])
    with pytest.raises(UserError, match="'label' is false: an answer that is not wanted"):
        read(path)
    named = Columns.of({"prompt": "prompt", "completion": "completion"})
    assert [turn["content"] for turn in read(path, named)[0][0].messages] == ["Name a river.", "Bonn."]


def test_columns_that_are_named(write: Write) -> None:
    path = write("a.jsonl", [{"frage": "Name a river.", "antwort": "The Elbe.", "regel": "Be brief.", "text": "no"}])
    columns = Columns.of({"prompt": "frage", "completion": "antwort", "system": "regel"})
    assert read(path, columns)[0][0].messages == [SYSTEM, *PLAIN]
    table = load_documents(find_sources(path, None, "train", Columns.of({"text": "frage"})))
    assert table["document"][:] == ["Name a river."]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"promt": "a"}, r"corpus\.columns: 'promt' is no meaning of a column; did you mean 'prompt'"),
        ({"completion": "a"}, "a completion needs a prompt"),
        ({"prompt": "a"}, "name one of text, messages, chosen, or prompt and completion"),
        ({"text": "a", "messages": "b"}, "name one of"),
    ],
)
def test_columns_that_mean_nothing(columns: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Columns.of(columns)


def test_tools_and_variables_of_a_row(write: Write) -> None:
    rows = [
        {"messages": PLAIN, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": PLAIN, "tools": json.dumps([FUNCTION]), "chat_template_kwargs": None},
        {"messages": PLAIN, "tools": [], "chat_template_kwargs": {}},
        {"messages": PLAIN, "tools": None},
    ]
    found, _ = read(write("a.jsonl", rows))
    assert [conversation.tools for conversation in found] == [[TOOL], [TOOL], None, None]
    assert [conversation.options for conversation in found] == [{"enable_thinking": False}, {}, {}, {}]
    assert [conversation.messages for conversation in found] == [PLAIN] * 4


def test_two_columns_of_one_meaning(write: Write) -> None:
    """The one that says something is taken; two that differ are refused."""
    asked = {"instruction": "Add", "output": "3"}
    rows = [
        {**asked, "input": "", "context": "1 and 2", "system": None, "system_prompt": "Be brief."},
        {**asked, "input": "1 and 2", "context": " ", "system": "Be brief.", "system_prompt": "Be brief."},
    ]
    found, _ = read(write("a.jsonl", rows))
    wanted = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add\n\n1 and 2"}]
    assert [conversation.messages[:2] for conversation in found] == [wanted] * 2
    with pytest.raises(UserError, match="row 1: columns 'input' and 'context' say different things"):
        read(write("b.jsonl", [{**asked, "input": "1", "context": "2"}]))


def test_calls_in_every_form_are_one(write: Write) -> None:
    arguments = {"city": "Graz", "days": None}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}}
    as_text = {**call, "function": {"name": "weather", "arguments": '{"city": "Graz"}'}}
    bare = {"name": "weather", "arguments": arguments}
    speaker = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Graz"}}'}
    filled = {**call, "id": None, "function": {"name": "weather", "arguments": arguments}}
    rows = [
        *({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [c]}]} for c in (call, as_text, bare)),
        {"conversations": [SHAREGPT[0], speaker]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [filled], "name": None}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": json.dumps([call])}]},
        {"messages": [USER, {"role": "assistant", "content": "", "function_call": as_text["function"]}]},
        {"messages": [USER, {"role": "assistant", "content": "",
                             "tool_calls": [{"name": "weather", "parameters": arguments}]}]},
    ]  # fmt: skip
    found, _ = read(write("a.jsonl", rows))
    assert [conversation.messages[1] for conversation in found] == [
        {"role": "assistant", "content": "", "tool_calls": [call]}
    ] * len(rows)


def test_arguments_are_decoded_once(write: Write) -> None:
    """A text inside them that is JSON itself stays a text, and its nulls stay too."""
    inner = json.dumps({"query": '{"a": null}', "gone": None})
    call = {"function": {"name": "f", "arguments": inner}}
    (found,), _ = read(write("a.jsonl", [{"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}]))
    arguments = found.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"query": '{"a": null}', "gone": None}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, "row 1: the rows are under 'data', in one object: write"),
    ({"prompt": "x"}, r"no column 'text' or 'messages' \(known: prompt\): name the columns with corpus\.columns"),
    ({"chosen": "Human: x"}, "column 'chosen' has no question"),
    ({"question": 3, "answer": "x"}, "column 'question' is int, not text"),
    ({"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}]}, "message 1: content has a part of type 'im"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]}, "message 2: tool call 1: has no name"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments is no JSON"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "arguments are a list"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "args": {"a": 1}}]}]},
     r"tool call 1: has no arguments \(found: args\): name them arguments"),
    ({"messages": [USER, {**ANSWER, "loss": 0.5}]}, r"message 2: loss is 0\.5, not False or True"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"message 2: weight is 0\.5, not 0 or 1"),
    ({"messages": [USER, {**ANSWER, "train": "no"}]}, "message 2: train is 'no', not False or True"),
    ({"messages": [SYSTEM, *PLAIN], "system": "Be long."}, r"'system' and message 1 \(system\) say different things"),
    ({"prompt": "x", "completion": "y", "history": ["Hello", "Hi"]}, "'history' is no list of pairs of question"),
    ({"messages": PLAIN, "tools": "{"}, "row 1: tools is no JSON"),
    ({"messages": PLAIN, "tools": [{"type": "function"}]}, "row 1: tool 1 has no name"),
    ({"messages": PLAIN, "chat_template_kwargs": {"messages": 1}}, "'messages' cannot be set by a row"),
    ({"messages": PLAIN, "chat_template_kwargs": [1]}, "chat_template_kwargs are a list, not an object"),
    ({"conversations": [{"from": "hooman", "value": "x"}]}, "message 1: unknown role 'hooman'"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "message 1: function_call is no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_rows_that_mean_nothing(write: Write, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read(write("a.jsonl", [row]))


def test_a_named_column_that_is_missing(write: Write) -> None:
    columns = Columns.of({"prompt": "question", "completion": "reply"})
    with pytest.raises(UserError, match=r"no column 'reply', which corpus\.columns names; did you mean 'replay'"):
        read(write("a.jsonl", [{"question": "x", "replay": "y"}]), columns)


def test_a_named_column_that_no_row_has(write: Write) -> None:
    """One that single rows lack is read where it is."""
    rows = [{"q": "Name a river.", "a": "The Elbe.", "rule": "Be brief."}, {"q": "Name a river.", "a": "The Elbe."}]
    path = write("a.jsonl", rows)
    found, _ = read(path, Columns.of({"prompt": "q", "completion": "a", "system": "rule"}))
    assert [conversation.messages for conversation in found] == [[SYSTEM, *PLAIN], PLAIN]
    with pytest.raises(
        UserError, match=r"no row has the column 'rul', which corpus\.columns names; did you mean 'rule'"
    ):
        read(path, Columns.of({"prompt": "q", "completion": "a", "input": "rul"}))


def test_nothing_is_chosen_in_silence(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    with pytest.raises(UserError, match="the header has column 'text' twice: rename one of them"):
        read(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="'test' chooses files of a folder or of a hub data set; this is one file"):
        find_sources(write("train.jsonl", [{"text": "x"}]), None, "test")


def test_shapes_are_counted_and_learned(tokenizer: Any, write: Write) -> None:
    other = [{"role": "user", "content": "And another?"}, PLAIN[-1]]
    rows = [{"conversations": SHAREGPT}, {"prompt": "A river?", "completion": "The Elbe."}, {"messages": other}]
    sets = open_corpus(write("a.jsonl", rows), tokenizer, sequence_length=512, held_out=0)
    assert sets.shapes == {
        "conversations": 1,
        "ShareGPT conversations": 1,
        "pairs of prompt and completion": 1,
    }
    (sample,) = [sets.train[i] for i in range(len(sets.train))]
    learned = sample["input_ids"][1:][sample["loss_mask"][:-1]]
    assert tokenizer.decode(learned) == "The Elbe.<|im_end|>" * 3


def test_rows_without_tools_keep_their_fingerprint(tokenizer: Any, write: Write) -> None:
    """A cache that was begun before tools were read goes on."""
    sets = open_corpus(write("a.jsonl", [{"messages": PLAIN}]), tokenizer, sequence_length=64, held_out=0)
    canonical = json.dumps(PLAIN, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    assert sets.fingerprint == hashlib.sha256(b"messages" + hashlib.sha256(canonical).digest()).hexdigest()
    assert sets.rendering == {}


def test_a_completion_without_a_question_is_no_empty_row(write: Write) -> None:
    rows = [{"prompt": " ", "completion": "The Elbe."}, {"prompt": "Name a river.", "completion": ""}]
    with pytest.raises(UserError, match=r"row 1: column 'completion' answers nothing, because 'prompt' is blank"):
        read(write("a.jsonl", rows))
    assert read(write("b.jsonl", rows[1:]))[0][0].messages == []
