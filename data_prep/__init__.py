"""Scripts that prepare data: demo data, features, LLaVA JSON."""
