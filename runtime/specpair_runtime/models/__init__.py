"""Models: loading, the slot cache, forward passes over it."""
