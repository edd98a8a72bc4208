"""A run before anything trains: its settings, its folder, its place in a launch, its media."""
