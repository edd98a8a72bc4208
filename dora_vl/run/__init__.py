"""What training and evaluation both stand on: a run's settings, its folder, its processes and its base."""
