"""Reward functions: plain functions from text to a number."""
