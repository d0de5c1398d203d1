"""Evaluation: what a model knows, and how much it suffers from its own mistakes."""
