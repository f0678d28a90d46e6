"""The two packages whose LLaVA classes can be pruned. Only the code in this folder distinguishes between them."""
