"""One run's rollouts: what is asked, the live machinery on rank 0, and its word to all ranks."""
