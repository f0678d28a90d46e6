"""The pruning methods, one file each. Every file in this folder is imported, and each method registers itself."""
