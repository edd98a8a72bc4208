"""From a file of any format to batches: examples, readers, tables and streams, samples; pictures and videos."""
