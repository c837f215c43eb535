"""A server as author: busy, slow, broken and foreign ones, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import AutoTokenizer

from distill.errors import UserError
from distill.generation.authors import Asked
from distill.generation.sampling import Sampling
from distill.generation.server import ServerAuthor

Reply = tuple[int, bytes, dict[str, str]]


def reply(content: Any, status: int = 200, **headers: str) -> Reply:
    return status, json.dumps(content).encode(), headers


class Server:
    """A server of one model, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], Reply | None] = lambda request: self.said("yes")
        self.models: Any = {"data": [{"id": "the-teacher"}]}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send(reply(outer.models) if self.path == "/v1/models" else reply({}, 404))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append(request)
                    found = outer.answer(request)
                if found is None:
                    self.connection.close()
                else:
                    self.send(found)

            def send(self, found: Reply) -> None:
                status, body, headers = found
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def said(self, text: str, reason: str | None = "stop", **usage: int) -> Reply:
        return reply({"choices": [{"text": text, "finish_reason": reason}], "usage": usage})


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture(scope="module")
def tokenizer(world: Any) -> Any:
    return AutoTokenizer.from_pretrained(world.folder / "teacher")


@pytest.fixture
def author(server: Server, tokenizer: Any) -> Callable[..., ServerAuthor]:
    def make(model: str | None = None, **options: Any) -> ServerAuthor:
        given = {"sampling": Sampling(seed=3), "max_new_tokens": 9, "batch_size": 4, "wait": waits.append, **options}
        return ServerAuthor(server.url, model, tokenizer=tokenizer, end_ids=(2, 0), **given)

    waits: list[float] = []
    make.waits = waits  # type: ignore[attr-defined]
    return make


ASKED = [Asked([5, 6, 7], number, 0, is_answer=number < 2) for number in range(3)]


def test_texts_become_tokens_and_end_where_the_server_ended_them(author: Any, server: Server, tokenizer: Any) -> None:
    texts = {5: "the peace", 6: "no<|im_end|>", 7: "and so on"}

    def answer(request: dict[str, Any]) -> Reply:
        return server.said(texts[request["prompt"][0]], "length" if request["prompt"][0] == 7 else "stop")

    server.answer = answer
    asked = [Asked([first], first, 0, is_answer=first == 5) for first in texts]
    answers = author(sampling=Sampling(top_k=5), max_new_tokens=40).write(asked, lambda _: None)
    peace, no, on = (tokenizer.encode(text, split_special_tokens=True) for text in texts.values())
    assert [(each.ids, each.ended) for each in answers] == [([*peace, 2], True), ([*no, 0], True), (on, False)]
    assert 2 not in no, "written letter by letter"
    assert {(each["model"], each["max_tokens"], each["top_k"]) for each in server.asked} == {("the-teacher", 40, 5)}
    assert len({each["seed"] for each in server.asked}) == 3 and "min_p" not in server.asked[0]


def test_what_passes_is_asked_for_again(author: Any, server: Server) -> None:
    """A busy server, one that is starting, half an answer, a broken connection, and an answer that lacks its end."""
    troubles: list[Reply | None] = [
        reply({"error": {"message": "slow down"}}, 429, Retry_After="7"),
        reply({}, 503),
        (200, b'{"choices": [{"te', {}),
        (200, b'{"choices"', {"Content_Length": "999"}),
        None,
        reply({"choices": []}),
        server.said("half", None),
    ]
    server.answer = lambda request: troubles.pop(0) if troubles else server.said("whole", completion_tokens=1)
    writer = author(batch_size=1)
    (answer,) = writer.write(ASKED[:1], lambda _: None)
    assert answer.ended and len(server.asked) == 8
    assert author.waits[0] == 7 and author.waits[1:] == [2.0**attempt if attempt < 6 else 60 for attempt in range(1, 7)]
    assert all(request == server.asked[0] for request in server.asked), "the same request each time"


def test_a_server_that_takes_no_ids_gets_the_text_and_must_read_it_alike(
    author: Any, server: Server, tokenizer: Any
) -> None:
    refused = reply({"error": "cannot unmarshal array"}, 400)
    read = 3
    server.answer = lambda request: (
        refused if isinstance(request["prompt"], list) else server.said("yes", prompt_tokens=read, completion_tokens=50)
    )
    writer = author()
    assert len(writer.write(ASKED, lambda _: None)) == 3 and writer.other_counts == 3
    assert server.asked[-1]["prompt"] == tokenizer.decode([5, 6, 7])
    read = 4
    with pytest.raises(UserError, match="reads 4 tokens of a prompt of 3: it has another tokenizer"):
        author().write(ASKED, lambda _: None)


def test_what_never_passes_is_one_message(author: Any, server: Server) -> None:
    server.answer = lambda request: reply({"content": "yes", "stop": True})  # llama.cpp's own form, beside /v1
    with pytest.raises(UserError, match="another form than OpenAI's completions: is /v1 missing"):
        author().write(ASKED, lambda _: None)
    assert len(server.asked) <= len(ASKED), "not asked again"
    server.answer = lambda request: reply({"error": {"message": "prompt too long"}}, 400)
    with pytest.raises(UserError, match=r"refuses a request .status 400: prompt too long"):
        author().write(ASKED, lambda _: None)
    server.answer = lambda request: reply({}, 500)
    with pytest.raises(UserError, match=r"no whole answer in 8 tries .status 500.*kept"):
        author().write(ASKED, lambda _: None)


def test_a_server_that_is_not_there_or_has_another_model_is_refused(author: Any, server: Server) -> None:
    with pytest.raises(UserError, match="no model 'the-techer'; did you mean 'the-teacher'"):
        author("the-techer")
    server.models = {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(UserError, match=r"2 models: name one as generate.server_model"):
        author()
    server.models = {"models": []}
    with pytest.raises(UserError, match="no list of models"):
        author()
    server.url = "http://127.0.0.1:1/v1"
    with pytest.raises(UserError, match=r"does not answer .*start the server"):
        author()
