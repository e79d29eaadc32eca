"""What a run would take and how long: before it is started, by formulas alone."""
