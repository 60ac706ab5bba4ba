"""Which rows and columns of a block belong together, and making them fewer: the base of structured pruning."""
