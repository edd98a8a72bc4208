"""From a trained model to numbers and pictures: predictions, scores, plots."""
