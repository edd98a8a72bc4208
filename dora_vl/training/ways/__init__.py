"""Ways in which a decoder learns: from answers, from comparing them, or from rewards for its own."""

from dora_vl.training.ways.preferences import Preferences
from dora_vl.training.ways.rewards import Rewards
from dora_vl.training.ways.supervised import Supervised

WAYS = {"supervised": Supervised, "preference": Preferences, "reward": Rewards}
"""Maps the kind of a run's objective to the way in which it trains."""
