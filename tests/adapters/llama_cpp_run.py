"""Asks llama.cpp: `python llama_cpp_run.py` with cases as JSON on stdin prints what it says, as JSON.

A process of its own, as a fault in there would end the tests.
"""

from __future__ import annotations

import base64
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def posted(address: str, path: str, body: object) -> Any:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def server(folder: Path) -> Any:
    """llama.cpp's own server over an export's files, in float32 where it has the choice."""
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    if (folder / "mmproj.gguf").is_file():
        params.mmproj.path = str(folder / "mmproj.gguf")
    params.hostnames, params.port, params.verbosity = ["127.0.0.1"], 0, -1
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 512, 1, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def asked(case: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens with their log probabilities behind a prompt, and texts as tokens."""
    running = server(Path(case["folder"]))
    address, prompt = running.listening_address, case["prompt"]
    if "picture" in case:
        with urllib.request.urlopen(f"{address}/props", timeout=60) as answer:
            mark = json.load(answer)["media_marker"]
        picture = base64.b64encode(Path(case["picture"]).read_bytes()).decode()
        prompt = {"prompt_string": prompt.replace("<image>", mark), "multimodal_data": [picture]}
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 5, "samplers": ["temperature"]}
    likely = posted(address, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
    split = {"parse_special": True}
    return {
        "next": {token["id"]: token["logprob"] for token in likely},
        "tokens": [posted(address, "/tokenize", {"content": text, **split})["tokens"] for text in case["texts"]],
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps([asked(case) for case in json.load(sys.stdin)]) + "\n")
