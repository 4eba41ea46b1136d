"""A sampling loop as a torch module, and as a program compiled ahead of time."""
