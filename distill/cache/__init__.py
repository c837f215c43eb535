"""The teacher's answers on disk: the format, its writer and its reader."""
