"""When this worker will be gone: by an option, by Slurm, by a spot notice of a cloud."""
