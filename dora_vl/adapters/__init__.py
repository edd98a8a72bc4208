"""The adapter folder: written and read strictly, other tools' formats, merge, combine, and PEFT models on this core."""
