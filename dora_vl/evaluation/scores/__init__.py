"""Official scores: one function a benchmark."""
