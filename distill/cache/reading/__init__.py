"""The reading of a cache: records to batches, verification, statistics."""
