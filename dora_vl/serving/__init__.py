"""What people use a model through: a server of many adapters, unmerged, a page, and a plugin for vLLM."""
