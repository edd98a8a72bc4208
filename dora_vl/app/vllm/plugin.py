"""The entry point that vLLM calls in each of its processes: looks at this vLLM, and changes it only if it is known.

`VLLM_PLUGINS` chooses plugins by name; this one's is `dora_vl`.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module

from dora_vl.app.vllm.cpu_base_rows import KERNELS, SHRINK, mend
from dora_vl.app.vllm.places import HELPER, TESTED, difference

log = logging.getLogger("vllm.dora_vl")  # below vLLM's own, whose handler and level it so has
UNTESTED = "DORA_VL_UNTESTED_VLLM"
"""Set to 1, it has a version tried that the plugin was never run with, if its places are the same."""
_done = False


def register() -> None:
    """Lets vLLM serve DoRA adapters, or leaves it as it is with one line that says why; once, however often called."""
    global _done
    if _done:
        return
    _done = True
    version = str(import_module("vllm").__version__)
    if takes_dora():
        log.info("dora_vl: vLLM %s takes DoRA adapters itself; its own way is left to it", version)
        return
    reason = reason_against(version)
    if reason is not None:
        log.warning(
            "dora_vl: DoRA adapters are not served and vLLM is left as it is: %s (tested with vLLM %s)",
            reason,
            ", ".join(TESTED),
        )
        return
    import_module("dora_vl.app.vllm.patches").install()
    if mend():
        log.info(
            "dora_vl: %s.%s of vLLM %s gives rows of the base the last slot's adapter; mended", KERNELS, SHRINK, version
        )


def takes_dora() -> bool:
    """Whether vLLM's own look at an adapter's config lets `use_dora` pass."""
    try:
        helper = import_module(HELPER).PEFTHelper
        seen = helper.from_dict({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True})
        return bool(seen.use_dora) and not seen._validate_features()
    except (ImportError, AttributeError, TypeError, ValueError):
        return False


def reason_against(version: str) -> str | None:
    """Why this vLLM is not to be changed; None where nothing speaks against it."""
    known = {minor_of(one) for one in TESTED}
    if minor_of(version) not in known and os.environ.get(UNTESTED) != "1":
        return f"version {version} was never tried; {UNTESTED}=1 tries it"
    return difference()


def minor_of(version: str) -> tuple[str, ...]:
    """`0.32` of `0.32.1+cpu`, in parts."""
    return tuple(version.split("+")[0].split(".")[:2])
