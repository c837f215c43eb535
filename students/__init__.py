"""Students: one a file, each a callable that returns a language model to train. They import only `distill.models`."""
