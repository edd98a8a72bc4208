"""A run's folder as one page for people: read, drawn as SVG, written by templates; nothing in it asks any host."""
