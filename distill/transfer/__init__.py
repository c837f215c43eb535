"""Caches and students on the way to a bucket or a hub and back: whole, resumable, and never over anything."""
