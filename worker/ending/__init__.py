"""When this worker will be gone: because of an option, Slurm, or a cloud's spot notice."""
