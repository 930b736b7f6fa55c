"""Coarse-to-fine workbench: length-limited RLHF on a base model, then a residue merge into an instruction model."""

__version__ = "0.1.0"
