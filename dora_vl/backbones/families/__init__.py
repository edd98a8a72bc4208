"""Everything that is known of single families of models, in tables and in what their rows name."""
