"""What people use a model through: a server of many adapters, unmerged, and a plugin for vLLM."""
