"""lightning_grpo."""
