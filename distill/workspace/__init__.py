"""From an experiment to the things it names: what several recipes need."""
