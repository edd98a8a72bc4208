"""A language model with an adapter, or a model alone, as lm-eval's model `dora_vl`.

    python -m dora_vl.evaluation.harnesses.lm_eval_model run --model dora_vl \
        --model_args adapter=runs/commonsense/adapter --tasks arc_easy,piqa --batch_size 8

lm-eval finds no models of installed packages, so this module registers one and then is its command line. It is asked
as lm-eval asks: no template but the one that its own options name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from dora_vl.errors import exit_on_user_error
from dora_vl.evaluation.open_model import ModelRequest, open_model


@register_model("dora_vl")
class AdaptedLM(HFLM):
    """lm-eval's own model of transformers, with our adapter in its layers.

    Args:
        adapter: an adapter folder; or else `model`, a model's folder or hub id, asked without one.
        base, any_base, strength: as `dora-vl ask` has them.
        options: of HFLM, such as `batch_size` and `add_bos_token`.
    """

    def __init__(
        self,
        adapter: str | None = None,
        model: str | None = None,
        base: str | None = None,
        any_base: bool = False,
        strength: float = 1.0,
        device: str | None = None,  # the GPU where there is one
        **options: Any,
    ) -> None:
        request = ModelRequest(
            adapter=None if adapter is None else Path(adapter),
            model=model,
            base=base,
            any_base=any_base,
            strength=strength,
            template="cloze" if adapter is None else None,  # lm-eval writes the prompts
        )
        assistant: Any = open_model(request).adapted
        tokenizer = assistant.prompts.encoder.tokenizer
        super().__init__(pretrained=assistant.backbone.model, tokenizer=tokenizer, backend="causal", **options)


@exit_on_user_error
def main() -> None:
    """lm-eval's command line, which knows the model now."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
