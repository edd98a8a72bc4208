"""Arrays in annotations, `Float[Tensor, "rows columns"]`: words for a reader, unless jaxtyping is there to check them.

`make test-all` loads jaxtyping first and compares shapes and types at each call; nothing else needs it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if not TYPE_CHECKING and "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as UInt8

__all__ = ["Bool", "Float", "Int", "UInt8"]
