"""Published data sets as records: one function per source."""
