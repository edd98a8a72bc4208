"""Ways in which a decoder learns: from answers, from comparing them, or from rewards for its own."""
