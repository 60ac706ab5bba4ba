"""Pruning while training, and training what was pruned: masks that hold or move, tickets, recovery."""
