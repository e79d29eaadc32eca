"""The command line; the entry point imports the standard library only."""
