"""The cache's format: bytes, records, shards, manifest, journal."""
