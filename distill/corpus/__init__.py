"""The corpus: reading, chat templates, tokenising, the held-out split and packing; `open_corpus` is the entry point."""

from distill.corpus.gathering import Gathered
from distill.corpus.opening import open_corpus
from distill.corpus.sample_sets import SampleSets
from distill.corpus.samples import Samples

__all__ = ["Gathered", "SampleSets", "Samples", "open_corpus"]
