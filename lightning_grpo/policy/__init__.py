"""The language model itself: loading, the packed forward pass to logprobs, export."""
