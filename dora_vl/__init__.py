"""dora_vl: adapts vision-language models with DoRA, weight-decomposed low-rank adaptation."""
