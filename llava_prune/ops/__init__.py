"""Tensor functions and token counts that two or more methods use. Depends on torch only."""
