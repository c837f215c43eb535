"""The parts of a forecast: models without weights, what each phase takes, sizes on disk, and what would make it fit."""
