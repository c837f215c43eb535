"""The corpus: reading, chat templates, tokenising, the held-out split and packing; `open_corpus` is the entry point."""

from distill.corpus.opening import SampleSets, open_corpus
from distill.corpus.samples import Samples

__all__ = ["SampleSets", "Samples", "open_corpus"]
