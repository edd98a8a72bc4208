"""Makes the core faster; each piece can be switched off, with the same results up to rounding."""
