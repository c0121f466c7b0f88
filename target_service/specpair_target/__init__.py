"""The target service: verifies proposals with the large model."""
