"""LEGCNet from a recipe to a folder: perceptrons, weights and rows of a language model, units of one."""
