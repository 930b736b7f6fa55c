"""Which models there are and how they are made: loading, pretraining, fine-tuning, reward models."""
