"""Measurements a person can repeat; each prints a table and writes JSON."""
