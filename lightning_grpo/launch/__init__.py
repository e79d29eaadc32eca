"""GPU placement and job scripts for Slurm and Ray."""
