"""DoRA adapters unmerged in vLLM: its tokens beside those of PEFT and transformers, on tiny random models, on CPU.

    python -m benchmarks.vllm_dora --vllm-python vllm/bin/python --json benchmarks/results.jsonl

`language`: two DoRA adapters, a LoRA and the base in one batch, against PEFT's unmerged answers, with biases and
without; then with one slot for all of them; then with the gains left at 1, which must not agree. `llava`: a LLaVA that
this project composes, trains and exports (`dora-vl export --for vllm`), with pictures, against itself unmerged in
transformers, and merged (`dora-vl merge`). `server`: the same through vLLM's OpenAI-compatible server. vLLM may live in
an environment of its own (docs/export.md); dora_vl must be installed there, for its plugin.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from benchmarks.report import write_json
from benchmarks.vllm_models import (
    ADAPTERS,
    ENGINE,
    ENVIRONMENT,
    PROMPTS,
    agreement,
    ask,
    by_peft,
    greedy,
    in_vllm,
    shown,
    tiny_llama,
    unlike_the_base,
    write_adapter,
    write_language_model,
)
from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.errors import UserError, exit_on_user_error

Answers = Mapping[str, Sequence[Mapping[str, Any]]]
"""Tokens and log probabilities of each answer, by who gave it."""
PARTS = ("language", "llava", "server")
ROOT = Path(__file__).parents[1]
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 220), "white": (250, 250, 250)}
QUESTION = "Say the colour."
CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
SECONDS_TO_START = 300


@exit_on_user_error
def main() -> None:
    """Runs the parts, prints the tables and writes the JSON; exit status 1 where something does not agree."""
    options = read_options()
    disable_progress_bar()
    figures: dict[str, Any] = {"vllm": version_of(options.vllm_python)}
    with tempfile.TemporaryDirectory() as folder:
        if "language" in options.parts:
            figures["language"] = language_figures(Path(folder), options)
        if {"llava", "server"} & set(options.parts):
            figures["llava"] = llava_figures(Path(folder), options)
    if options.json is not None:
        write_json(options.json, figures)
    if not all(agrees(case) for part in ("language", "llava") for case in figures.get(part, {}).values()):
        sys.exit(1)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), help="default: this one")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def version_of(python: Path) -> str:
    """vLLM's version there.

    Raises:
        UserError: there is none, or no dora_vl beside it.
    """
    if not python.is_file():
        raise UserError(f"--vllm-python {python}: there is no such file")
    code = "import dora_vl.serving.vllm.plugin, vllm; print(vllm.__version__)"
    completed = in_vllm(python, ["-c", code], check=False)
    if completed.returncode:
        reason = completed.stderr.strip().splitlines()[-1:]
        raise UserError(f"{python}: {' '.join(reason)}; --vllm-python names an interpreter with vllm and dora_vl")
    return completed.stdout.split()[-1]


def agrees(case: Mapping[str, Any]) -> bool:
    """Whether every token is the same and no adapter's are the base's; with gains left at 1, DoRA's must be others."""
    whole = {name: min(figures["same_tokens"]) == figures["of"] for name, figures in case["answers"].items()}
    if not all(case["unlike_the_base"].values()):
        return False
    if case["gains"]:
        return all(whole.values())
    return not any(same for name, same in whole.items() if name.startswith("dora"))


# -- language models -----------------------------------------------------------------------------------------


def language_figures(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The cases, by name."""
    figures = {}
    prompts = [{"ids": prompt} for prompt in PROMPTS]
    for base in ("plain", "biased"):
        path = folder / base
        write_language_model(path, biases=base == "biased")
        adapters = {
            name: write_adapter(path, folder / f"{base} {name}", 10 + seed, **config)
            for seed, (name, config) in enumerate(ADAPTERS.items())
        }
        expected = {key: by_peft(path, adapter, options.tokens) for key, adapter in (("base", None), *adapters.items())}
        cases = {f"{base}, one batch": (len(adapters), True)}
        if base == "biased":
            cases |= {"biased, one slot for all": (1, True), "biased, gains left at 1": (len(adapters), False)}
        for title, (slots, gains) in cases.items():
            engine = {"skip_tokenizer_init": True, "max_loras": slots}
            case = batch_case(path, adapters, expected, prompts, options, gains=gains, **engine)
            figures[title] = {**case, "max_loras": slots}
            shown(title, figures[title])
    return figures


def batch_case(
    base: Path,
    adapters: Mapping[str, Path],
    expected: Answers,
    prompts: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    *,
    gains: bool = True,
    **engine: Any,
) -> dict[str, Any]:
    """Every prompt for the base and each adapter, one after another, so that a batch mixes them."""
    requests = [(name, number) for number in range(len(prompts)) for name in expected]
    job = {
        "model": str(base),
        "engine": {**ENGINE, **engine},
        "adapters": {name: str(path) for name, path in adapters.items()},
        "requests": [{"adapter": name, **prompts[number]} for name, number in requests],
        "gains": gains,
    }
    answers = dict(zip(requests, ask(base.parent, job, options), strict=True))
    by_name = {name: [answers[name, number] for number in range(len(prompts))] for name in expected}
    return compared(by_name, expected, gains=gains)


def compared(answers: Answers, expected: Answers, *, gains: bool = True) -> dict[str, Any]:
    """A case of the results."""
    alike = {name: agreement(answers[name], expected[name]) for name in expected}
    return {"gains": gains, "unlike_the_base": unlike_the_base(expected), "answers": alike}


# -- pictures: a LLaVA composed, trained, exported and merged here ----------------------------------------------


def llava_figures(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Offline: base and adapter in a batch, the merged model alone. Then the server, asked for both."""
    run, pictures = train_one(folder), [folder / "data" / f"{colour}.png" for colour in COLOURS]
    served, merged = folder / "served", folder / "merged"
    command("dora_vl.cli", "export", "--for", "vllm", "--adapter", run / "adapter", "--to", served)
    command("dora_vl.cli", "merge", "--adapter", run / "adapter", "--to", merged)
    expected = expected_answers(folder / "base", run / "adapter", served / "base", pictures, options.tokens)
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    if "llava" in options.parts:
        prompts = [{"text": PROMPT, "picture": str(picture)} for picture in pictures]
        adapters, alone = {"dora": served / "adapter"}, {"merged": expected["dora"]}
        cases["base and adapter"] = lambda: batch_case(
            served / "base", adapters, expected, prompts, options, max_loras=1
        )
        cases["merged"] = lambda: batch_case(merged, {}, alone, prompts, options, max_loras=1, enable_lora=False)
    if "server" in options.parts:
        cases["server"] = lambda: by_server(served, expected, pictures, options)
    figures = {}
    for title, case in cases.items():
        figures[title] = case()
        shown(f"LLaVA, {title}", figures[title])
    return figures


# -- a LLaVA as a person makes one ---------------------------------------------------------------------------


def train_one(folder: Path) -> Path:
    """Writes parts and data, composes and trains on them; the run's folder."""
    write_tower(folder / "tower")
    write_llama(folder / "language")
    write_data(folder / "data")
    settings = {
        "model": {
            "base": str(folder / "base"),
            "compose": {
                "vision_library": "transformers",
                "vision_name": str(folder / "tower"),
                "image_mean": [0.48, 0.46, 0.41],
                "image_std": [0.27, 0.26, 0.28],
                "language_model": str(folder / "language"),
            },
            "template": "vicuna_v1",
            "dtype": "float32",
        },
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "data": {"train": str(folder / "data" / "train.json"), "image_folder": str(folder / "data"), "workers": 0},
        "optim": {"projector_learning_rate": 1e-2},
        "training": {
            "output_dir": str(folder / "run"),
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 10,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command("tasks.llava_instruct", "--config", folder / "run.yaml")
    return folder / "run"


def command(module: str, *words: str | Path) -> None:
    """Runs one of the project's commands.

    Raises:
        UserError: it failed; what it said stands above.
    """
    completed = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        sys.stderr.write(completed.stdout + completed.stderr)
        raise UserError(f"{module} ended with status {completed.returncode}")


def write_tower(folder: Path) -> None:
    """A CLIP tower of four patches."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        initializer_range=0.3,
    )
    CLIPVisionModel(config).save_pretrained(folder)


def write_llama(folder: Path) -> None:
    """A LLaMA of two layers with a byte-level tokenizer and a chat template."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    texts = [f"USER: {QUESTION} ASSISTANT: A chat between", *COLOURS]
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """A picture of each colour, and questions about them in LLaVA's format."""
    folder.mkdir()
    records = []
    for index, (colour, shade) in enumerate(COLOURS.items()):
        picture = Image.new("RGB", (28, 28), shade)
        picture.paste((10, 10, 10), (4 * index, 4, 4 * index + 8, 16))
        picture.save(folder / f"{colour}.png")
        talk = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": colour}]
        records += [{"id": f"{colour}-{copy}", "image": f"{colour}.png", "conversations": talk} for copy in range(10)]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")


# -- what it answers here ------------------------------------------------------------------------------------


def expected_answers(
    base: Path, adapter: Path, served_base: Path, pictures: Sequence[Path], tokens: int
) -> dict[str, list[dict[str, list[Any]]]]:
    """Of the run's adapter on the run's base, unmerged, and of the exported base alone."""
    trained = open_backbone(str(base)).model
    load_adapter(trained, adapter)
    alone = LlavaForConditionalGeneration.from_pretrained(served_base)
    processor = AutoProcessor.from_pretrained(served_base)
    opened = [Image.open(picture).convert("RGB") for picture in pictures]
    inputs = [processor(images=picture, text=PROMPT, return_tensors="pt") for picture in opened]
    return {
        name: [greedy(model.eval(), batch, tokens) for batch in inputs]
        for name, model in (("base", alone), ("dora", trained))
    }


# -- what vLLM's server answers -----------------------------------------------------------------------------


def by_server(served: Path, expected: Answers, pictures: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """The same through chat completions of vLLM's own server, by OpenAI's client."""
    from openai import OpenAI

    answers: dict[str, list[dict[str, Any]]] = {}
    with serving(served, options.vllm_python) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
        for name in expected:
            answers[name] = [chat(client, name, picture, options.tokens) for picture in pictures]
    return compared(answers, expected)


def chat(client: Any, model: str, picture: Path, tokens: int) -> dict[str, Any]:
    """One question about a picture."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    choice = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=tokens,
        logprobs=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    extra = choice.model_extra or {}
    return {"tokens": extra["token_ids"], "logprobs": [token.logprob for token in choice.logprobs.content]}


@contextlib.contextmanager
def serving(served: Path, python: Path) -> Iterator[str]:
    """vLLM's server of an export, until the block ends; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 128 --max-num-seqs 4"
    environment = {**os.environ, **ENVIRONMENT}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = served.parent / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [
                *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", served / "base"),
                *("--served-model-name", "base", *words.split(), "--enable-lora", "--max-lora-rank", "8"),
                *("--lora-modules", f"dora={served / 'adapter'}"),
            ],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:  # and the processes that it started
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers.

    Raises:
        UserError: it ended, or did not begin in time.
    """
    for _ in range(SECONDS_TO_START):
        if process.poll() is not None:
            sys.stderr.write(log.read_text(encoding="utf-8"))
            raise UserError(f"vLLM's server ended with status {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(1)
    raise UserError(f"vLLM's server did not begin in {SECONDS_TO_START} s")


if __name__ == "__main__":
    main()
