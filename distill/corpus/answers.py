"""Answers in what a chat template renders: where each begins and ends, read off the template's own text around it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distill.corpus.conversations import Conversation, Message, function_of, is_learned
from distill.corpus.marks import FIRST, Marked, Piece
from distill.models.chat_templates import Span


class Unfit(Exception):
    """Reason why a conversation cannot be learned as one way of reading it has it."""

    def __init__(self, reason: str, weight: float = 1) -> None:
        super().__init__(reason)
        self.weight = weight
        """Rank of the reason, if several ways fail: the user is told the highest."""


@dataclass(frozen=True)
class Skeleton:
    """Rendering of marked messages: the template's own text, and the pieces in it."""

    text: str
    literals: list[str]
    """The template's own texts, around the pieces."""
    numbers: list[int]
    """The pieces' numbers, in the order in which they are written."""

    def after(self, number: int) -> str | None:
        """Return the template's own text behind the last place of a piece; None if it is not written."""
        if number not in self.numbers:
            return None
        return self.literals[len(self.numbers) - self.numbers[::-1].index(number)]


class Answers:
    """The places of messages in a marked conversation, and what is learned of each."""

    def __init__(
        self,
        marked: Marked,
        skeleton: Callable[[Conversation, bool], Skeleton],
        units: re.Pattern[str],
    ) -> None:
        """Render the whole. `skeleton` renders marked messages, with or without the generation prompt behind them.

        `units` matches the units in which texts are compared; its group 1 matches added tokens.
        """
        self._marked, self._conversation, self._units = marked, marked.conversation, units
        self._skeleton = skeleton
        self.whole = skeleton(self._conversation, False)
        """The rendering of the whole conversation."""
        if any(number >= len(marked.pieces) for number in self.whole.numbers):
            raise Unfit("private-use characters (U+F0000 and up) in the chat template or in a tool")
        self._without_thought: set[int] = set()

    def check_all_is_written(self) -> int:
        """Return the number of thoughts that the template takes out by its own rule. Raises Unfit for other losses."""
        self._check_tools()
        written = set(self.whole.numbers)
        for number, piece in enumerate(self._marked.pieces):
            if number in written or not (piece.text.strip() or piece.number is not None):
                continue
            if piece.part == "tools":
                raise Unfit("the chat template does not write the row's tools, so nothing could be called", 4)
            if piece.part == "thought":
                if number not in self._skeleton(self._until(piece.message + 1), False).numbers:
                    raise Unfit(
                        f"message {piece.message + 1}: the chat template does not write its thought "
                        "(corpus.thoughts: drop leaves thoughts out)",
                        4,
                    )
                self._without_thought.add(piece.message)
                continue
            what = {"content": "content", "name": "tool call", "call": "tool call's arguments"}[piece.part]
            role = self._conversation.messages[piece.message]["role"]
            raise Unfit(
                f"message {piece.message + 1} ({role}): the chat template does not write its {what}",
                3 if piece.part == "content" else 4,
            )
        for index in self._without_thought:
            if any(self._marked.pieces[n].message == index and self._is_thought(n) for n in written):
                raise Unfit(f"message {index + 1}: the chat template writes a part of its thought", 3)
        for index, message in enumerate(self._conversation.messages):
            self._check_calls(index, message)
        return len(self._without_thought)

    def chosen(self, conversation: Conversation, only_last: bool) -> list[int]:
        """Return the numbers of the assistant's messages that are to be learned."""
        answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        return [index for index in (answers[-1:] if only_last else answers) if is_learned(conversation.messages[index])]

    def all_but_unlearned(self, conversation: Conversation, spans: list[Span], length: int) -> list[Span]:
        """Return everything but the messages whose row takes the loss from them."""
        learned, begin = [], 0
        for index, message in enumerate(conversation.messages):
            if not is_learned(message) and (place := self.place(index, spans)):
                learned.append((begin, place[0]))
                begin = self.end(index, spans)
        return [span for span in [*learned, (begin, length)] if span[0] < span[1]]

    def place(self, index: int, spans: list[Span]) -> Span:
        """Return the characters from a message's first piece to its last."""
        first, last = self._run(index)
        return spans[first][0], spans[last][1]

    def learned(self, index: int, spans: list[Span]) -> list[Span]:
        """Return the span of an answer: from the end of the generation prompt to the end-of-turn token.

        Empty for an answer whose thought the template takes out, after a prompt that opens one: no model would say it.
        """
        if index == 0:
            raise Unfit("the conversation begins with the assistant; nothing asks for that answer", 5)
        first, _ = self._run(index)
        begins = spans[first - 1][1] if first else 0
        lead = self.whole.literals[first]
        prompt, plain = (self._skeleton(self._until(index), on) for on in (True, False))
        if prompt.text == plain.text:  # the template knows no generation prompt
            start = begins + len(self._header_of_answer(index, first))
        else:
            asked = prompt.literals[-1]
            if prompt.numbers[-1:] != self.whole.numbers[first - 1 : first]:
                asked = self._added_by_prompt(prompt.text, plain.text, lead)
            shared = self._common(lead, asked)
            if not shared and asked:
                raise Unfit(
                    f"message {index + 1}: the chat template's generation prompt is not in what it renders, so the "
                    "answer cannot be told from the prompt"
                )
            ours, theirs = (re.match(r"\s*(\w+)", text[len(shared) :]) for text in (lead, asked))
            if ours and theirs:  # two names of the role, not a thought that is opened
                raise Unfit(
                    f"message {index + 1}: the chat template's generation prompt has '{theirs[1]}' where what it "
                    f"renders has '{ours[1]}', so no answer stands behind a prompt"
                )
            if index in self._without_thought and not lead.startswith(asked):
                return []
            start = begins + len(shared)
        return [(start, self.end(index, spans))]

    def end(self, index: int, spans: list[Span]) -> int:
        """Return the character behind a message's end-of-turn token."""
        _, last = self._run(index)
        return spans[last][1] + len(self._ending(index, last))

    def _added_by_prompt(self, prompt: str, plain: str, lead: str) -> str:
        """Return the lead up to and with the text that `add_generation_prompt` adds, or "" if it is not there."""
        added = prompt[len(self._common(prompt, plain)) :]
        for end in range(len(added), 0, -1):
            at = lead.rfind(added[:end])
            if at >= 0 and added[:end].strip():
                return lead[: at + end]
        return added

    def _header_of_answer(self, index: int, first: int) -> str:
        """Return the part of an answer's lead that any other answer would have in its place."""
        lead, before = self.whole.literals[first], self._marked.pieces[self.whole.numbers[first]].before
        lead = lead[: len(lead) - len(before)] if lead.endswith(before) else lead
        if not self._conversation.messages[index].get("tool_calls"):
            return lead
        number = len(self._marked.pieces)
        plain = {"role": "assistant", "content": self._as_content(chr(FIRST + number))}
        try:
            other = self._skeleton(self._of([*self._conversation.messages[:index], plain]), False)
        except Unfit:
            return lead
        return self._common(lead, other.literals[other.numbers.index(number)]) if number in other.numbers else lead

    def _ending(self, index: int, last: int) -> str:
        """Return the text behind an answer that ends it: what the template writes whether or not a turn follows.

        A separator after the end-of-turn token ("\\n" in ChatML) is never generated, so it is not learned either.
        """
        messages, number = self._conversation.messages, self.whole.numbers[last]
        is_last = index == len(messages) - 1
        behind = self.whole.literals[last + 1]
        alone = self._after(messages[: index + 1], number)
        if alone is None:
            alone = behind
        followed = behind
        if is_last:
            followed = self._after([*messages, self._user()], number) or behind
        common = self._common(alone, followed)
        if ended := self._through_last_token(common):
            return self._without_opening(ended)
        if not self._through_last_token(alone):
            return common
        # The template ends the last turn otherwise than earlier ones (gpt-oss: <|return|> and <|end|>).
        if is_last:
            return self._leading_tokens(alone)
        header = self._header(messages[index + 1])
        return self._through_last_token(behind[: len(behind) - len(self._common_end(behind, header))])

    def _after(self, messages: list[Message], number: int) -> str | None:
        try:
            return self._skeleton(self._of(messages), False).after(number)
        except Unfit:
            return None

    def _header(self, message: Message) -> str:
        try:
            return self._skeleton(self._of([message]), False).literals[0]
        except Unfit:
            return ""

    def _user(self) -> Message:
        return {"role": "user", "content": self._as_content(chr(FIRST + len(self._marked.pieces)))}

    def _as_content(self, text: str) -> Any:
        parts = any(isinstance(message.get("content"), list) for message in self._conversation.messages)
        return [{"type": "text", "text": text}] if parts else text

    def _until(self, end: int) -> Conversation:
        return self._of(self._conversation.messages[:end])

    def _of(self, messages: list[Message]) -> Conversation:
        return Conversation(messages, self._conversation.tools, self._conversation.options)

    def _run(self, index: int) -> tuple[int, int]:
        """Return the first and the last place of a message's pieces. Raises Unfit if they are not together."""
        owners = [self._marked.pieces[number].message for number in self.whole.numbers]
        if index not in owners:
            raise Unfit(f"message {index + 1}: an empty answer, which the chat template leaves out")
        first = last = owners.index(index)
        # The result of a call may follow at once and begin with the function's name.
        while (
            owners[last + 1 : last + 2] == [index]
            and self.whole.numbers[last + 1] not in self.whole.numbers[: last + 1]
        ):
            last += 1
        for place in range(last + 1, len(owners)):
            piece = self._marked.pieces[self.whole.numbers[place]]
            if piece.message == index and piece.part != "name":  # results may name the function that was called
                raise Unfit(f"message {index + 1}: the chat template writes it in several places")
        return first, last

    def _is_thought(self, number: int) -> bool:
        return self._marked.pieces[number].part == "thought"

    def _check_tools(self) -> None:
        own = "".join(self.whole.literals)
        for tool in self._conversation.tools or []:
            name = str(function_of(tool).get("name", ""))
            if name not in own:
                raise Unfit(f"the chat template does not write the row's tools ('{name}' is missing)", 4)

    def _check_calls(self, index: int, message: Message) -> None:
        calls = message.get("tool_calls") or []
        if not calls:
            return
        first, last = self._run(index)
        own = "".join(self.whole.literals[first : last + 2])
        for call in calls:
            function = function_of(call)
            name, arguments = str(function.get("name", "")), function.get("arguments", {})
            if isinstance(arguments, dict):
                if arguments and str(arguments) in self.whole.text:
                    raise Unfit(f"message {index + 1}: the chat template writes arguments as Python, not as JSON")
                if lost := [key for key in arguments if str(key) not in own]:
                    what = f"the argument '{lost[0]}' of its tool call"
                    raise Unfit(f"message {index + 1}: the chat template does not write {what}", 4)
            elif str(arguments) not in self.whole.text:
                raise Unfit(f"message {index + 1}: the chat template does not write its tool call's arguments", 4)
            if not any(self._is_name(number, name) for number in self.whole.numbers[first : last + 1]) and (
                name not in own
            ):
                raise Unfit(f"message {index + 1} (assistant): the chat template does not write its tool call", 4)

    def _is_name(self, number: int, marked_name: str) -> bool:
        piece: Piece = self._marked.pieces[number]
        return piece.part == "name" and marked_name == chr(FIRST + number)

    def _common(self, one: str, other: str) -> str:
        """Return the common beginning of two texts, in whole units."""
        end = 0
        for ours, theirs in zip(self._units.finditer(one), self._units.finditer(other), strict=False):
            if ours[0] != theirs[0]:
                break
            end = ours.end()
        return one[:end]

    def _common_end(self, one: str, other: str) -> str:
        ours, theirs = ([unit[0] for unit in self._units.finditer(text)] for text in (one, other))
        count = 0
        while count < min(len(ours), len(theirs)) and ours[-1 - count] == theirs[-1 - count]:
            count += 1
        return "".join(ours[len(ours) - count :])

    def _through_last_token(self, text: str) -> str:
        ends = [unit.end() for unit in self._units.finditer(text) if unit[1]]
        return text[: ends[-1]] if ends else ""

    def _without_opening(self, text: str) -> str:
        """Return the text without tokens at its end that open the next turn, which some templates write in any case."""
        units = [unit[0] for unit in self._units.finditer(text)]
        while len(units) > 1 and re.search(r"start|begin", units[-1], re.IGNORECASE):
            units.pop()
        return self._through_last_token("".join(units)) or text

    def _leading_tokens(self, text: str) -> str:
        end = 0
        for unit in self._units.finditer(text):
            if not unit[1]:
                break
            end = unit.end()
        return text[:end]
