"""The command `cache-teacher`: what is left to make, and the teacher's reading."""

from distill.recipes.cache_teacher.command import main

__all__ = ["main"]
