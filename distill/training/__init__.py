"""Training a student from a cache under Lightning."""
