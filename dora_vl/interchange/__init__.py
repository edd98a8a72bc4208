"""Adapters in and out of other tools' formats: convert, merge, combine, and PEFT models on this core."""
