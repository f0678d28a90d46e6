"""The two packages whose LLaVA can be pruned; the only code that knows one from the other."""
