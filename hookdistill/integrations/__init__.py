"""hookdistill inside other trainers: one module for each, which imports its framework at the top."""
