"""One process-wide count of optimizer steps: the key that tells whether a cached norm is still true.

A parameter's `_version` and `data_ptr` stay the same under DeepSpeed ZeRO 0-3 when the engine updates it
(measured), so a cache keyed on them goes stale in silence. torch's optimizer post-hook fires at every step of
every optimizer, DeepSpeed's included (checked under ZeRO 1, 2, 3), and needs no Trainer.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts optimizer steps of this process once `watch` was called."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        """Starts counting; called by the first adapted layer, so that importing changes nothing."""
        if not self._watching:
            register_optimizer_step_post_hook(self._advance)
            self._watching = True

    def _advance(self, optimizer: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.count += 1


OPTIMIZER_STEPS = OptimizerSteps()
