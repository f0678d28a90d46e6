"""Acceleration that no GPU has run yet: CUDA graphs and Triton kernels. Reached through `engine.py` only."""
