"""The ways of training, by the kind of a run's objective."""

from dora_vl.training.ways.preferences import Preferences
from dora_vl.training.ways.rewards import Rewards
from dora_vl.training.ways.supervised import Supervised

WAYS = {"supervised": Supervised, "preference": Preferences, "reward": Rewards}
"""Maps `heads.objectives.Objective.kind` to the way."""
