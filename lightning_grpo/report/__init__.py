"""A run's files as a page, as text, as a trace, as pictures: read from disk, without torch."""
