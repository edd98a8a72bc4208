"""The adapter folder: written and read strictly, other tools' formats, merge, and PEFT models on this core."""
