"""Plain English, as far as a test can tell: docstrings begin with a verb (functions) or a noun (all else)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distill", "teachers", "students")


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A function's docstring begins with one of these. A verb that is missing is added here; a noun gets "Return" before it.
VERBS = words(
    """
    abort accept accumulate acquire activate adapt add adjust advance agree align allocate allow answer
    append apply ascertain ask assemble assert assign attach average avoid backpropagate be begin bind bound
    bring broadcast build cache calibrate call cancel cast change check choose chunk claim clean clear clip
    close code collate collect combine compare compile complete compress compute concatenate configure
    confirm connect construct continue convert copy correct count cover create cut decide declare decode
    decompress decrypt delete deliver dequantise derive describe detach detect determine disable discard
    distil distribute divide do double download draw drop dump embed empty enable encode end ensure enter
    enumerate erase escape estimate evaluate exclude exit expand expect explain export express extend
    extract fall feed fetch fill filter find finish fit fix flatten flush fold follow forecast forget fork
    format forward free freeze fuse gather generate get give go group guess halve hand handle hash hide hold
    identify ignore import include index infer initialise insert inspect install invert isolate iterate join
    judge keep label launch learn leave let limit link list load locate lock log look make map mark mask
    match materialise mean measure merge migrate mirror mix modify move multiply name normalise note notice
    obtain offer offload omit open order pack pad parse part partition pass patch pause peek perform permute
    pick pin pipe place plan play plot pop prefer prepare present print process produce profile protect
    prove provide prune pull push put quantise queue quit quote raise rank reach react read rebuild
    recalculate receive recognise recompute record recover redirect reduce refuse register release reload
    remake remember remove rename render reopen reorder repair repeat replace replay report request require
    reset reshape resolve respond restart restore restrict resume retry return reuse reverse rewind rewrite
    rotate round run sample save say scale scan schedule score search seed select send separate set shard
    share shift shorten show shrink shuffle shut signal silence simulate size skip slice smooth sort split
    spread stack stage start state step stop store stream strip subtract suggest sum summarise supply
    suspend swap switch sync synchronise take tell terminate test tie time tokenise trace track train
    transfer transform translate transpose treat trim truncate try turn type undo unite unlock unpack unwrap
    update upload use validate verify view visit wait walk warn watch weigh widen work wrap write yield zero
    """
)
# Verbs that are nouns too may begin the docstring of a module or a class.
NOUNS = words(
    """
    answer benchmark bound call change check code count cover cut draw end estimate export forecast format
    group index label limit link list lock log map mark mask match measure mix name order pad part pause
    place plan plot present process profile queue rank record release repair report request round run sample
    schedule score search seed shard share silence size slice sort stack stage state step store stream sum
    test time track transform type update use view walk work
    """
)
# Clauses without a main clause, pronouns without a noun, and prepositions: no name of a thing begins like this.
FREE = words(
    """
    about above after against also although among and anyone anything around as at because before behind
    below beneath beside between but by during else ever everyone everything for from he here how however if
    in inside into it its likewise never nobody nor not nothing of on only onto or otherwise our outside
    over per she since so someone something such than that their them then there these they this those
    though through to told under unless until we what whatever when whenever where wherever whether which
    whichever while who whoever whom whose why with within without you your
    """
)
THIRD_PERSON = words(
    "adds asks collects does feeds gives hands holds keeps knows learns lets makes puts reads remembers runs says shows"
    " simulates stands takes tells trains waits wraps writes"
)


def docstrings(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, name, text) of each docstring and of each string that stands below a constant or a field.

    The kinds are `module`, `class`, `function`, `property` and `constant`.
    """
    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield "module", "", text
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            kind = "class" if isinstance(node, ast.ClassDef) else "property" if is_property else "function"
            yield kind, node.name, ast.get_docstring(node) or ""
        body = getattr(node, "body", None)
        for above, below in pairwise(body) if isinstance(body, list) else ():
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(above, (ast.Assign, ast.AnnAssign)) and isinstance(text, str):
                yield "constant", ast.unparse(above).split(" =")[0], text


def fault(kind: str, text: str) -> str | None:
    """Return the reason why a docstring's beginning breaks the rule of its kind, or None."""
    first, second, *_ = [*text.split(), "", ""]
    word = first.lower()
    plain = word.rstrip(",.:;")
    if kind == "function":
        return None if plain in VERBS else f"a function begins with a verb, not with {first!r} (VERBS in this file)"
    if plain in FREE or (plain == "none" and second != "means") or (plain == "all" and second == "that"):
        return f"a {kind} begins with a noun, not with {first!r}"
    if kind in ("module", "class") and plain in (VERBS - NOUNS) | THIRD_PERSON:
        return f"a {kind} begins with a noun, not with the verb {first!r}"
    return None


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def faults(source: str) -> list[str]:
    """Return one line for each docstring that breaks the rule."""
    return [f"{name or kind}: {why}" for kind, name, text in docstrings(source) if (why := fault(kind, text))]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_docstrings_begin_with_a_verb_or_a_noun(path: Path) -> None:
    assert faults((ROOT / path).read_text(encoding="utf-8")) == []


CLAUSES = words("what whatever whether how of those which whichever where whose who why")


@pytest.mark.parametrize("folder", ["configs", "tests"])
def test_docstrings_elsewhere_begin_with_no_free_clause(folder: str) -> None:
    """Tests say in a sentence what they show; they begin as they like, but not with a clause."""
    bad = [
        f"{path.relative_to(ROOT)}: {name or kind}: {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for kind, name, text in docstrings(path.read_text(encoding="utf-8"))
        if text.split()[0].lower() in CLAUSES
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("module", "What a batch takes."),
        ("module", "How targets are read back."),
        ("module", "Find a checkpoint's files."),
        ("class", "What was found."),
        ("class", "Hands shards over to a thread."),
        ("class", "Of one sample, its targets."),
        ("property", "Those that are left."),
        ("constant", "None: all of it."),
        ("constant", "Whether to repair."),
        ("constant", "In bytes."),
        ("constant", "Its length."),
        ("constant", "All that a step needs."),
        ("function", "The records of a shard."),
        ("function", "What a batch takes."),
        ("function", "Whether it fits."),
        ("function", "Bytes a token."),
        ("function", "Raises UserError for what is no size."),
        ("function", "Inside, libraries are quiet."),
        ("function", "`count` numbers."),
    ],
)
def test_a_wrong_beginning_is_found(kind: str, text: str) -> None:
    assert fault(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("module", "Memory and time of a batch."),
        ("module", "`distill plan`: the forecast of an experiment."),
        ("module", "Measurement of a machine."),
        ("class", "A target's exact entries."),
        ("class", "Sums over positions."),
        ("class", "Raised when a record is damaged."),
        ("property", "Number of shards."),
        ("constant", "None means all of it."),
        ("constant", "Recompute activations in the backward pass."),
        ("constant", "Bytes a token."),
        ("function", "Return the records of a shard."),
        ("function", "Raise UserError if the text is not a size."),
        ("function", "Tell whether it fits."),
    ],
)
def test_a_right_beginning_passes(kind: str, text: str) -> None:
    assert fault(kind, text) is None


def test_every_kind_of_docstring_is_seen() -> None:
    source = '"""M."""\nA = 1\n"""A."""\nclass C:\n    """C."""\n    b: int = 1\n    """B."""\n'
    source += '    @property\n    def p(self):\n        """P."""\n    def f(self):\n        """F."""\n'
    kinds = [(kind, name, text) for kind, name, text in docstrings(source)]
    expected = {("module", "", "M."), ("constant", "A", "A."), ("class", "C", "C."), ("constant", "b: int", "B.")}
    assert set(kinds) == expected | {("property", "p", "P."), ("function", "f", "F.")}
