"""The training of a student from a cache under Lightning."""
