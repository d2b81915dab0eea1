"""Workers as Slurm jobs: submitted when requests wait, ended when nothing does."""
