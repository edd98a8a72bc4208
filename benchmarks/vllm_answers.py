"""Run by vLLM's own Python for `benchmarks.vllm_dora`: one batch of requests, each of the base or of an adapter.

python benchmarks/vllm_answers.py JOB.json ANSWERS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads the job, answers it in one batch, writes tokens and log probabilities."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if not job["gains"]:
        leave_gains_at_one()
    Path(sys.argv[2]).write_text(json.dumps(answers(job)), encoding="utf-8")


def leave_gains_at_one() -> None:
    """What a server would answer that reads A and B alone."""
    from dora_vl.serving.vllm.layer import DoRALayer

    def nothing(self: DoRALayer, slot: int, minus_one: object) -> None:
        pass

    DoRALayer.put_dora = nothing


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The greedy tokens of every request, with their log probabilities, and the version that gave them."""
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    model = vllm.LLM(job["model"], **job["engine"])
    adapters = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0)
    outputs = model.generate(
        [prompt_of(request) for request in job["requests"]],
        sampling,
        lora_request=[adapters.get(request["adapter"]) for request in job["requests"]],
        use_tqdm=False,
    )
    return {"vllm": vllm.__version__, "answers": [answer_of(output.outputs[0]) for output in outputs]}


def prompt_of(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, or a text with its picture."""
    if "ids" in request:
        return {"prompt_token_ids": request["ids"]}
    from PIL import Image

    with Image.open(request["picture"]) as picture:
        return {"prompt": request["text"], "multi_modal_data": {"image": picture.convert("RGB")}}


def answer_of(output: Any) -> dict[str, Any]:
    """Tokens and the log probability of each."""
    tokens = list(output.token_ids)
    chosen = zip(tokens, output.logprobs, strict=True)
    return {"tokens": tokens, "logprobs": [candidates[token].logprob for token, candidates in chosen]}


if __name__ == "__main__":
    main()
