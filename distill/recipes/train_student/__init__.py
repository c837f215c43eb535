"""The command `train-student`: what is left to do, and the training itself."""

from distill.recipes.train_student.command import main

__all__ = ["main"]
