"""The forecast: memory, time and disk of an experiment's phases, before any weight is loaded."""
