"""The folder on disk: written whole or not at all, verified from outside, inspected."""
