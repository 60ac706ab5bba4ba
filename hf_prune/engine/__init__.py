"""The walk over the blocks: capture, accumulate, reduce, solve, hand on."""
