"""The command `evaluate`: models, their measurements, and their results."""

from distill.recipes.evaluate.command import main

__all__ = ["main"]
