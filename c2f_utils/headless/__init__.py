"""How notebooks run without a browser."""
