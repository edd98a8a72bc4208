"""Readers of the files that people have: `containers` gives rows, which `data.sample_rows` makes into samples."""
