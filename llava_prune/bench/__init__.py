"""Time, memory and FLOPs of pruned and unpruned requests."""
