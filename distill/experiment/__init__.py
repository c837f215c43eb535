"""The experiment: its typed configuration, its file, its folders, and the one way from it to its objects."""
