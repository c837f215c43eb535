"""Cards, processors and disks: published figures, and measurements of this machine."""
