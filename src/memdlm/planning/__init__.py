"""Preflight: what a training step will need, found by running it on tensors without data."""
