"""The commands, one file or folder each. Recipes never import one another."""
