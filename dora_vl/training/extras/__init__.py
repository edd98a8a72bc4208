"""What a run may add to its way of training."""
