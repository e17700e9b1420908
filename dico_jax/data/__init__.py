"""Training examples: where they come from, and their order."""
