"""Other tools' settings as a run's YAML, and back: a table by hand for each tool, nothing left out in silence."""
