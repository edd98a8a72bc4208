"""The first steps: makes a run from a user's folder, fetches the demo, and checks this machine."""
