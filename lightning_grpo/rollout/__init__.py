"""Prompts in, groups of trajectories out: torch-free asyncio around inference servers."""
