"""Sampling: processors, seeded noise, acceptance rules."""
