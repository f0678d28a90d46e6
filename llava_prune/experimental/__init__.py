"""Experimental acceleration, not tested on a GPU: CUDA graphs and Triton kernels. `engine.py` is the only entry."""
