"""DoRA itself, in plain torch: needs torch and the standard library."""

from dora_vl.core.config import DoRAConfig as DoRAConfig
from dora_vl.core.inject import apply_dora as apply_dora
from dora_vl.core.inject import merge_dora as merge_dora
from dora_vl.core.inject import strip_adapters as strip_adapters
from dora_vl.core.inject import unmerge_dora as unmerge_dora
from dora_vl.core.linear import DoRALinear as DoRALinear
from dora_vl.core.trainable import Gather as Gather
from dora_vl.core.trainable import TrainedPart as TrainedPart
from dora_vl.core.trainable import adapted_layers as adapted_layers
from dora_vl.core.trainable import trained_parts as trained_parts
