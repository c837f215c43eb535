"""The system below: files, locks, processes, interrupts, progress, energy, units."""
