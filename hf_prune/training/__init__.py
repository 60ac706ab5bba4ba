"""Pruning while training, and training what was pruned: masks that hold, tickets, recovery."""
