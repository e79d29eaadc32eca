"""Tensors in, tensors out: batch records, packing, advantages, losses, corrections, KL, metrics."""
