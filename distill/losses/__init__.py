"""What the student minimises: divergences as pure functions of a chunk, and the head and loss in one pass."""
