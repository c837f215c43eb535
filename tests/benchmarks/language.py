"""Counts of the language of docstrings and comments: "what" clauses per 10,000 words, comments per 1,000 lines.

    python tests/benchmarks/language.py [FOLDER ...]

Without folders, it reads distill, teachers and students. Commit 742f23d had 90 clauses and 13 comments; nanochat has 4
and 166.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

CLAUSE = re.compile(
    r"\bwhat (is|was|are|were|it|they|its|a|an|the|has|had|have|does|can|this|that|one)\b", re.IGNORECASE
)


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]


def strings(source: str) -> list[str]:
    """Return docstrings and the strings below constants and fields: all strings that are statements."""
    found = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    return [node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def main(folders: list[str]) -> None:
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    remarks = [comment for source in sources for comment in comments(source)]
    text = "\n".join(remarks + [string for source in sources for string in strings(source)])
    words, lines = len(text.split()), sum(len(source.splitlines()) for source in sources)
    clauses = sum(1 for _ in CLAUSE.finditer(text))
    print(f"{words:,} words, {lines:,} lines")
    print(f'{10_000 * clauses / words:.0f} "what" clauses per 10,000 words')
    print(f"{1_000 * len(remarks) / lines:.0f} comments per 1,000 lines")


if __name__ == "__main__":
    main(sys.argv[1:] or ["distill", "teachers", "students"])
