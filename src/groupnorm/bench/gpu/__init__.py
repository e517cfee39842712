"""The GPU engine compiled without a GPU, checked on one, and measured on one. Needs torch and Triton, nothing else."""
