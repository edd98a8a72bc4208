"""Heads: what a task computes from a backbone's features; a loss and named numbers."""
