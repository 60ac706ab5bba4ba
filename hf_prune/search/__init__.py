"""Hyperpruning: a search over ways to prune, by what a candidate's dynamics or its loss say early."""
