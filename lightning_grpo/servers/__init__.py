"""Where the URLs of inference servers come from."""
