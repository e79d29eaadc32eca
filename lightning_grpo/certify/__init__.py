"""Proof that a model's path is right: its packed pass, its gradient, what is published of it."""
