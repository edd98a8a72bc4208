"""DoRA adapters in vLLM's own LoRA slots, unmerged: a plugin that vLLM finds by its entry point.

vLLM keeps A and B of several adapters beside the frozen weights and says for each token which slot it takes. The plugin
lays g - 1 beside them: one row per slot, and a row of zeros for tokens of the base.

    y = g * (W x + B A x) + b,    g = m / ||W + B A||       (s is in B already)

Nothing here imports vLLM at its head; `plugin.register` leaves a version that was not tested as it is.
"""
