"""The first steps: a person's folder becomes a run, and what this machine has for it."""
