"""How a method is put on a model: the language-model loop, the vision door, attach and detach."""
