"""`distill chat`: what it answers, what it remembers, how it is stopped, and that no half characters are printed."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TokenizersBackend

from distill import plugins
from distill.errors import UserError
from distill.generation.talk import GrowingText, ModelSpeaker
from distill.models.generation import HALF
from distill.models.language_model import Head
from distill.models.saving import save_language_model
from distill.plugins import load_language_model
from distill.recipes.chat import Chat, main
from distill.system.progress import visible

pytestmark = pytest.mark.usefixtures("one_thread", "no_traces")
GREEDY = {"temperature": 0.0, "top_p": 1.0, "generator": None}


@pytest.fixture(scope="module")
def student(world: Any) -> Path:
    return Path(world.folder) / "teacher"


@pytest.fixture(scope="module")
def tokenizer(student: Path) -> Any:
    return AutoTokenizer.from_pretrained(student)


@pytest.fixture
def talk(student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`talk(lines, run=…, seed=…)`: what the command prints behind its first line when the lines are piped to it."""

    def run(lines: list[str], run: Path = student, **options: Any) -> str:
        given = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0, "system": None, **options}
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(str(run), **given) == 0
        introduction, _, out = capsys.readouterr().out.partition("\n")
        assert introduction.startswith(f"chat: {run}, ") and "cpu" in introduction and "/quit" in introduction
        return out

    return run


def their_answer(student: Path, messages: list[dict[str, str]], new_tokens: int = 12) -> str:
    """transformers' own."""
    tokenizer: Any = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text)])
    new = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, eos_token_id=[0, 2], pad_token_id=0)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_each_line_is_answered_with_the_conversation_so_far(talk: Any, student: Path) -> None:
    turns = [said("system", "Be brief."), said("user", "What is the Congress?")]
    first = their_answer(student, turns)
    turns += [said("assistant", first.strip()), said("user", "And why?")]
    second = their_answer(student, turns)
    assert first.strip() and second.strip()
    assert talk(["What is the Congress?", "", "And why?"], system="Be brief.") == visible(f"{first}\n{second}\n")


def test_commands(talk: Any, student: Path) -> None:
    fresh = visible(their_answer(student, [said("user", "And why?")]))
    found = talk(["What is the Congress?", "/reset", "And why?", "/rest it", "/quit", "And why?"])
    assert found.split("\n", 1)[1] == f"(forgotten)\n{fresh}\n" + (
        "(/rest: no such command; did you mean '/reset'? (known: /quit, /reset))\n"
    )
    assert fresh not in talk(["What is the Congress?", "And why?"]), "what was forgotten made a difference"


def test_a_seed_says_it_all(talk: Any) -> None:
    def text(seed: int) -> str:
        return talk(["Hello", "Who?"], seed=seed, temperature=1.5, top_p=0.95)

    assert text(1) == text(1) != text(2)
    assert talk(["Hello"], seed=None, temperature=1.5).strip()


def save_compact(folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    options = {"vocab_size": len(tokenizer), "hidden_size": 32, "layers": 2, "heads": 4}
    model = plugins.build("compact", "student", options, {})
    return save_language_model(model, folder / "student", "compact", options, tokenizer).parent


def test_a_student_of_any_architecture_in_a_run_folder(talk: Any, student: Path, tmp_path: Path) -> None:
    run = save_compact(tmp_path, AutoTokenizer.from_pretrained(student))
    assert talk(["Hello"], run / "student") == talk(["Hello"], run / "student")
    finished = io.StringIO("Hello\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", finished)
        assert main(str(run), 0.0, 1.0, 4, None, None) == 0


def test_without_a_chat_template_each_line_is_continued(talk: Any, student: Path, tmp_path: Path) -> None:
    plain: Any = AutoTokenizer.from_pretrained(student)
    plain.chat_template = None
    run = save_compact(tmp_path, plain) / "student"
    one, two = talk(["The Congress"], run), talk(["I have"], run)
    assert talk(["The Congress", "I have"], run) == one + two, "each by itself"
    with pytest.raises(UserError, match="no chat template"):
        main(str(run), 0.0, 1.0, 4, None, "Be brief.")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # Python's own, of UTF-8 and of C locales
def test_a_line_that_is_no_text_costs_that_line(
    talk: Any, errors: str, student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = talk(["Hello", "And why?"]).splitlines(keepends=True)
    piped = io.TextIOWrapper(io.BytesIO(b"Hello\nna\xefve\nAnd why?\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", piped)
    assert main(str(student), 0.0, 1.0, 12, 0, None) == 0
    said = capsys.readouterr().out.partition("\n")[2]
    assert said == f"{first}(this line is not utf-8 text, and is not answered)\n{second}"


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_the_largest_seeds(talk: Any, seed: int) -> None:
    assert talk(["Hello"], seed=seed, temperature=1.0).strip()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real signal in the middle of the first answer, and one at the prompt; the end of the input ends the chat."""
    whole = their_answer(student, [said("user", "Hello")], 40)
    growing, reads = GrowingText.add, []
    lines = iter(["Hello", KeyboardInterrupt, "And why?", EOFError])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def interrupted(text: GrowingText, token: int) -> str:
        reads.append(token)
        if len(reads) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return growing(text, token)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(GrowingText, "add", interrupted)
    assert main(str(student), 0.0, 1.0, 40, None, None) == 0
    assert signal.getsignal(signal.SIGINT) is before
    answers = capsys.readouterr().out.partition("\n")[2]
    first, between, second = answers.split("\n(/quit or Ctrl-D leaves)\n")
    first = next(whole[:end] for end in range(len(whole)) if visible(whole[:end]) == first)
    assert 0 < len(first) < len(whole) / 2 and between == ""
    turns = [said("user", "Hello"), said("assistant", first.strip()), said("user", "And why?")]
    assert second == visible(their_answer(student, turns, 40)) + "\n\n", (
        "what was said before the interruption is remembered"
    )


def test_the_oldest_turns_make_room(student: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    long = "the Congress of the United States " * 4  # of 256 tokens that the model reads
    assert 60 < len(tokenizer.encode(long)) < 80
    chat = Chat(ModelSpeaker(load_language_model(student), tokenizer), "Be brief.")

    def turn(line: str) -> tuple[str, str]:
        return "".join(chat.answer(line, 12, GREEDY)), capsys.readouterr().out

    assert turn("Hello")[1] == turn(long)[1] == ""
    kept = chat.turns[2:]
    answer, notice = turn(long)
    assert notice == "(the context of 256 tokens is full: the oldest turn is forgotten)\n"
    assert chat.turns == [*kept, said("user", long), said("assistant", answer.strip())]
    assert answer == their_answer(student, [said("system", "Be brief."), *kept, said("user", long)])
    before = [*chat.turns]
    answer, notice = turn(long * 4)
    assert answer == "" and chat.turns == before, "what cannot be answered costs nothing"
    assert notice.startswith("(too long: ") and notice.endswith(" tokens, and the context of 256 has room for 244)\n")
    answer, notice = turn(long * 2)
    assert notice == "(the context of 256 tokens is full: the oldest 2 turns are forgotten)\n"
    assert chat.turns == [said("user", long * 2), said("assistant", answer.strip())]


class Scripted(nn.Module):
    """Behind each token comes the one that a table names."""

    def __init__(self, follows: dict[int, int], size: int) -> None:
        super().__init__()
        self.head = Head(torch.eye(size))
        self.follows = follows

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        next_BL = input_ids_BL.clone().apply_(lambda token: self.follows.get(token, 0))
        return nn.functional.one_hot(next_BL, self.head.weight_VD.shape[0]).float()


def test_characters_come_whole_and_the_end_of_the_turn_ends_the_answer(tokenizer: Any) -> None:
    answer = "日éx"
    asked = tokenizer.apply_chat_template([said("user", "?")], tokenize=False, add_generation_prompt=True)
    ids = [tokenizer.encode(asked)[-1], *tokenizer.encode(answer), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(set(ids)) == len(ids) == 8, "a chain"
    chat = Chat(ModelSpeaker(Scripted(dict(pairwise(ids)), len(tokenizer)), tokenizer))
    assert list(chat.answer("?", 100, GREEDY)) == ["日", "é", "x"]
    assert chat.turns == [said("user", "?"), said("assistant", answer)]
    chat.reset()
    assert list(chat.answer("?", 4, GREEDY)) == ["日", HALF], "the last token is half of a character: shown as such"
    silent = Chat(ModelSpeaker(Scripted({ids[0]: ids[-1]}, len(tokenizer)), tokenizer))
    assert list(silent.answer("?", 100, GREEDY)) == [] and silent.turns == []


def byte_fallback() -> Any:
    """As SentencePiece models have it: characters beyond the vocabulary are tokens of their bytes."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefgh "]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return TokenizersBackend(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "byte fallback"])
def of_bytes(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tokenizer if request.param == "byte-level" else byte_fallback()


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.one_of(st.sampled_from("abc é日😀🏳"), st.characters(exclude_categories=["Cs"])), max_size=12))
def test_pieces_join_to_the_text(of_bytes: Any, text: str) -> None:
    ids = of_bytes.encode(text, add_special_tokens=False)
    expected = of_bytes.decode(ids, skip_special_tokens=True)
    growing = GrowingText(of_bytes)
    pieces = [growing.add(token) for token in ids]
    assert "".join(pieces) + growing.rest() == expected == growing.shown
    if HALF not in text:
        assert HALF not in "".join(pieces)
        assert not expected or pieces[-1], "nothing whole is held back"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "--temperature -0.5"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top_p 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"seed": 2**64}, f"--seed {2**64}"),
        ({"seed": -(2**63) - 1}, f"--seed -{2**63 + 1}"),
        ({"system": "Be \udcff brief."}, "--system: not UTF-8"),
        ({"run": "nowhere"}, "nowhere: holds no finished student"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, student: Path) -> None:
    given = {"run": str(student), "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0, "system": None}
    with pytest.raises(UserError, match=message):
        main(**{**given, **options})


def test_a_template_that_refuses_a_system_message(student: Path, tmp_path: Path) -> None:
    strict: Any = AutoTokenizer.from_pretrained(student)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + strict.chat_template
    )
    run = save_compact(tmp_path, strict)
    with pytest.raises(UserError, match=r"refuses.*no system role"):
        main(str(run), 0.0, 1.0, 4, None, "Be brief.")


def test_what_would_steer_the_terminal_is_shown(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may have learned to write escape sequences, which retitle, clear or answer a terminal."""
    pieces = ["\x1b]0;mine\x07", "\x9b2J", "ok\r", "\n\tthe\x7f ", "\u202egnp.exe", " naïve 😀"]
    monkeypatch.setattr(Chat, "answer", lambda *_: (piece for piece in pieces))
    assert talk(["Hello"]) == "\\x1b]0;mine\\x07\\x9b2Jok\\r\n\tthe\\x7f \\u202egnp.exe naïve 😀\n"


def test_a_gguf_export_is_opened_by_llama_cpp(
    talk: Any, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
    from distill.export import gguf

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing that is said may go through one
    gguf.write(student, tmp_path / "export", "f16")
    capsys.readouterr()
    file = gguf.file(tmp_path / "export", "f16")
    turns = [said("system", "Be brief."), said("user", "What is the Congress?")]
    first = their_answer(student, turns)
    turns += [said("assistant", first.strip()), said("user", "And why?")]
    lines = ["What is the Congress?", "And why?"]
    assert talk(lines, file, system="Be brief.") == visible(f"{first}\n{their_answer(student, turns)}\n")
    (tmp_path / "export" / "model-q8_0.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"holds 2 GGUF files: name one, as .*f16"):
        main(str(tmp_path / "export"), 0.0, 1.0, 4, None, None)
    with pytest.raises(UserError, match=r"GGUF file, which llama\.cpp reads without a class"):
        main(str(file), 0.0, 1.0, 4, None, None, "my.py:Class")
    with pytest.raises(UserError, match=r"q8_0"):
        main(str(tmp_path / "export" / "model-q8_0.gguf"), 0.0, 1.0, 4, None, None)
