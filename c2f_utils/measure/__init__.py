"""How good an answer, a reward or a model is."""
