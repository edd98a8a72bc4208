"""Vision towers that yield grid tokens, image preparation and the store of frozen features."""
