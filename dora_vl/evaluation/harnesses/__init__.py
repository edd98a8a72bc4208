"""Adapters, unmerged, in the field's harnesses: as a model of EleutherAI's lm-eval and of LMMs-Lab's lmms-eval."""
