"""Distillation of a large language model on one small card: cache the teacher once, then train the student."""

__version__ = "0.1.0"
