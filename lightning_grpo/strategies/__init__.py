"""Sharded training: FSDP2 as a Lightning strategy and as a plain function."""
