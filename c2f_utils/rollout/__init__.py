"""How answers are made: samplers behind one protocol."""
