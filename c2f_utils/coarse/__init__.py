"""How coarse RLHF steps: PPO with a critic on a base model while a law moves the output-length limit."""
