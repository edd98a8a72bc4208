"""Readers of the files that people have: `containers` gives rows, and `row_formats` makes each an `Example`."""
