"""The first steps: a person's folder or another tool's settings become a run, and what this machine has for it."""
