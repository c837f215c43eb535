"""Teachers: one a file, each a callable that returns a frozen language model. They import only `distill.models`."""
