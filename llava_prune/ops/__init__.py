"""Pure tensor functions and counts that two papers or more use. Depends on torch only."""
