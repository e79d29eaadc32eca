"""Workflows of several turns, tools, and the endpoint for existing agents."""
