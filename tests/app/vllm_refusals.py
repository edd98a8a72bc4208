"""Run by vLLM's own Python for test_vllm_serves.py: what it says of adapters that it cannot serve, and that it goes on.

python vllm_refusals.py BASE SAID.json GOOD BAD...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import vllm
    from vllm.lora.request import LoRARequest

    base, said, good, *bad = sys.argv[1:]
    model = vllm.LLM(
        base,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=8,
        skip_tokenizer_init=True,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    def tokens(adapter: LoRARequest | None) -> list[int]:
        (found,) = model.generate({"prompt_token_ids": [1, 20, 33]}, sampling, lora_request=adapter, use_tqdm=False)
        return list(found.outputs[0].token_ids)

    served = LoRARequest("good", 1, good)
    before = [tokens(None), tokens(served)]
    lines = {}
    for number, folder in enumerate(bad, 2):
        name = Path(folder).name
        try:
            model.llm_engine.add_lora(LoRARequest(name, number, folder))
            lines[name] = None
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is what is asked for
            lines[name] = f"{error}"
    after = [tokens(None), tokens(served)]
    Path(said).write_text(json.dumps({"lines": lines, "before": before, "after": after}))


if __name__ == "__main__":
    main()
