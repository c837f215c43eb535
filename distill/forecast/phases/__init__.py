"""One simulation a phase: a teacher's batch, a training step, an evaluation's batch."""
