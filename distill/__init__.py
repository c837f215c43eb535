"""Distil a large language model into a small one on one small card: cache the teacher once, then train the student."""

__version__ = "0.1.0"
