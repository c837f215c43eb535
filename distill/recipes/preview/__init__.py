"""The command `preview`: samples as tokens, and counts of each source, before the teacher is loaded."""

from distill.recipes.preview.command import main

__all__ = ["main"]
