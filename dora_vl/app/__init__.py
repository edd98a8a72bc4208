"""What people use a model through: a server of many adapters, unmerged."""
