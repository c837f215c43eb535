"""The command `init`: a look at card and data, a proposal that fits, and its experiment file with comments."""

from distill.recipes.init.command import Wishes, main

__all__ = ["Wishes", "main"]
