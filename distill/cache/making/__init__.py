"""The making of a cache: the teacher's passes, shards, parts, merges and repairs."""
