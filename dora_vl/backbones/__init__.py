"""Backbones: load a model, encode turns for it, run it, and say where DoRA goes in it."""
