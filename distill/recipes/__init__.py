"""One file a command: from the experiment to what the command promises. Recipes never import one another."""
