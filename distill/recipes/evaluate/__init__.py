"""The command `evaluate`: models, their measurements, and the record of these."""

from distill.recipes.evaluate.command import main

__all__ = ["main"]
