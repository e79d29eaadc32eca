"""New weights from the trainer's (sharded) parameters to every server, verified."""
