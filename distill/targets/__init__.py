"""Targets: schemes that make the teacher's distributions small, and the form that they have from then on."""
