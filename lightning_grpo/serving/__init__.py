"""Talking to servers: one client, what is known of each server, and a pool of them; no torch."""
