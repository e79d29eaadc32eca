"""Lightning callbacks: weight sync, signals, progress, health, trajectories."""
