"""Benchmarks by name: what each asks, where its data comes from, how an answer is scored."""
