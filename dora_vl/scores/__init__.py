"""Official scores: a file a scorer, each from predictions to metrics with the sums they are functions of."""
