"""The command `doctor`: probes of this machine, and findings from them."""

from distill.recipes.doctor.command import main

__all__ = ["main"]
