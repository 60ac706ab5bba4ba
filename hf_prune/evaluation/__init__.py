"""How good and how fast a model is: perplexity, efficiency, sample generations."""
