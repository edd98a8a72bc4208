"""What is started by hand to prepare data: demo data, features, records as LLaVA JSON."""
