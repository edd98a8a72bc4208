"""Turns published data sets into files that `dora_vl` trains on; one module a source, none needs torch."""
