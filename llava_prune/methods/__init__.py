"""One file a method; each registers itself, and every file here is found by name."""
