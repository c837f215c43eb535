"""The evaluation of a student beside its teacher: metrics, held-out text, benchmarks, speed and written texts."""
