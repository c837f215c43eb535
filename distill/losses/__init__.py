"""The student's loss: divergences as pure functions of a chunk, and head and loss in one pass."""
