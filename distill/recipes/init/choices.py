"""Choices that need no forecast: teachers in the order in which they are tried, the student's size, rates, lengths."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal

from distill.errors import UserError
from distill.experiment.configuration import StudentConfig
from distill.experiment.search import parse_parameters
from distill.forecast.machine.cards import Card
from distill.forecast.published import Published, published_models
from distill.forecast.steps import FEWEST_TOKENS, USEFUL_EPOCHS
from distill.models.checkpoints import DEMO_NAME, DEMO_PACKAGE
from distill.plugins import BUILT_IN

Goal = Literal["chat", "text", "draft"]
GOALS: dict[Goal, str] = {
    "chat": "answers, learned from conversations",
    "text": "writing on, learned from plain text",
    "draft": "a small draft model that makes its teacher faster (speculative decoding)",
}
SHARE = {"chat": 0.4, "text": 0.4, "draft": 0.1}
"""Share of the teacher's parameters that a student gets at most, if the card can train it."""
PARAMETERS_ON_A_PROCESSOR = 4e8
"""Largest teacher that is proposed without a card: it reads some hundred tokens a second."""
_OPEN = ("Qwen/", "HuggingFaceTB/")
"""Publishers whose models are fetched without an account."""
_NF4, _BESIDE = 0.75, 2.5e9
"""Bytes a parameter of a teacher in 4 bits, with its unquantised parts, and bytes beside: for a first guess."""
_TRAINED = {True: 6.0, False: 10.0}
"""Bytes a parameter of a student in training, with the strongest levers, on a card with bfloat16 and on one without."""
FRESH = ((960, 24, 15), (768, 16, 12), (576, 12, 9))
"""Sizes of students that begin from nothing: channels, layers and heads, three to a key."""
_USED = 0.85
"""Share of a card's memory that a first guess fills."""


def teachers(card: Card, goal: Goal) -> list[str]:
    """Return the published teachers to try on a card, the largest first."""
    if not card.is_cuda and goal == "chat" and importlib.util.find_spec(DEMO_PACKAGE) is not None:
        return [DEMO_NAME]
    models = {model.names: model for model in published_models().values() if model.names[0].startswith(_OPEN)}
    room = PARAMETERS_ON_A_PROCESSOR if not card.is_cuda else (_USED * card.memory_bytes - _BESIDE) / _NF4
    smallest = min(model.parameters for model in models.values())
    found = [model for model in models.values() if model.parameters <= max(room, smallest)]
    return [_variant(model, goal) for model in sorted(found, key=lambda model: -model.parameters)]


def _variant(model: Published, goal: Goal) -> str:
    """Return the name of the model that was taught to answer, or of the one that was not, as the goal needs it."""
    return next((name for name in model.names if _answers(name) == (goal != "text")), model.names[0])


def _answers(name: str) -> bool:
    if name.startswith("Qwen/"):
        return not name.endswith("-Base")
    return "Instruct" in name or name.endswith("-it")


def largest_student(card: Card) -> float:
    """Return the parameters of a student that a card can just train, by a first guess."""
    if not card.is_cuda:
        return card.memory_bytes / 4 / 16
    return max(1.0, _USED * card.memory_bytes - _BESIDE) / _TRAINED[card.has_bf16]


def students(
    asked: str | None, teacher: str, parameters: int, card: Card, goal: Goal, tokens: int | None = None
) -> Iterator[StudentConfig]:
    """Yield the students to try in turn, of a teacher with so many parameters. Raises UserError for a wrong `asked`.

    One that is cut out of its teacher comes in smaller and smaller sizes. Published ones of the teacher's tokens
    follow, or lead where the text, of so many `tokens`, is too short to teach a cut one: they know the language
    already. The last ones begin from nothing.
    """
    size = None if asked is None else _size(asked)
    if asked is not None and asked != "pruned" and size is None:
        yield StudentConfig("huggingface", {"model": asked})
        return
    most = min(SHARE[goal] * parameters, largest_student(card)) if size is None else size
    cut = [
        StudentConfig("pruned", search={"parameters": _rounded(most * shrunk)})
        for shrunk in ((1.0, 0.75, 0.55, 0.4, 0.25) if size is None else (1.0,))
    ]
    pretrained = _published(teacher, min(0.6 * parameters, largest_student(card)), goal) if asked is None else []
    is_little = tokens is not None and USEFUL_EPOCHS * tokens < FEWEST_TOKENS * most
    yield from (*pretrained, *cut) if is_little else (*cut, *pretrained)
    if asked is None:
        yield from (_fresh(*sizes) for sizes in FRESH)


def _fresh(hidden_size: int, layers: int, heads: int) -> StudentConfig:
    """Return a student that knows nothing yet, for teachers of which nothing small enough can be cut."""
    config = {"model_type": "llama", "hidden_size": hidden_size, "intermediate_size": 8 * hidden_size // 3 // 64 * 64}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 3}
    return StudentConfig(
        "huggingface", {"config": {**config, "max_position_embeddings": 2048, "tie_word_embeddings": True}}
    )


def _published(teacher: str, most: float, goal: Goal) -> list[StudentConfig]:
    """Return the published models of the teacher's tokens up to a size, the largest first."""
    facts = published_models().get(teacher)
    if facts is None:
        return []
    same = {model.names: model for model in published_models().values() if model.tokens == facts.tokens}
    smaller = sorted((each for each in same.values() if each.parameters <= most), key=lambda each: -each.parameters)
    return [StudentConfig("huggingface", {"model": _variant(model, goal)}) for model in smaller]


def _size(text: str) -> float | None:
    """Return the parameters that a text such as `60M` means, or None for a name."""
    if text in BUILT_IN["student"] and text != "pruned":
        raise UserError(f"--student {text}: give pruned, a size such as 60M, or a model's name or folder")
    try:
        return parse_parameters(text, "--student")
    except UserError:
        return None


def _rounded(parameters: float) -> int:
    """Return the number with two digits that is not above it."""
    unit = 10 ** max(0, len(str(int(parameters))) - 2)
    return max(1, int(parameters) // unit * unit)


def described(student: StudentConfig, teacher_parameters: int) -> str:
    """Return the student in words."""
    if student.class_path == "pruned":
        most = student.search["parameters"]
        return f"cut out of it, at most {most / 1e6:,.0f} M parameters ({most / teacher_parameters:.0%})"
    config = student.options.get("config")
    if config is None:
        return f"{student.options['model']}, pretrained"
    return (
        f"a fresh {config['model_type']} of {config['num_hidden_layers']} layers and {config['hidden_size']} channels"
    )


def learning_rate(student: StudentConfig, parameters: int) -> float:
    """Return the peak learning rate: high for small students that were cut, low for pretrained ones."""
    if student.class_path != "pruned":
        return 3e-4 if "config" in student.options else 3e-5
    return next(rate for most, rate in ((1e8, 1e-3), (5e8, 3e-4), (float("inf"), 1e-4)) if parameters <= most)


def sequence_length(card: Card, is_conversation: bool, tokens: int | None, context: int | None) -> int:
    """Return the tokens of a sample: enough for most conversations, and some hundred samples of little text."""
    wanted = 1024 if card.is_cuda else 512 if is_conversation else 256
    if not is_conversation and tokens is not None:
        while wanted > 256 and tokens / wanted < 400:
            wanted //= 2
    return wanted if context is None else min(wanted, context)
