"""The student beside its teacher: metrics and the walk over held-out text."""
