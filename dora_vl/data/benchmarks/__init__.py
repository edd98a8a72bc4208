"""Published data sets as records: one function a source."""
