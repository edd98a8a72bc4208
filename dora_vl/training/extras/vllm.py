"""Answers drawn by a vLLM server, which gets the adapter before each step and serves it unmerged."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from PIL import Image

from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.settings import VLLM_RANKS
from dora_vl.backbones.base import Backbone
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.families.targets import resolved_layers
from dora_vl.backbones.output_store import PictureReader
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.towers import ImagePreparation
from dora_vl.core import adapted_layers, trained_parts
from dora_vl.data.example import Example
from dora_vl.data.samples import Sample, sample_random
from dora_vl.errors import SettingError, UserError, one_line, short_names
from dora_vl.run.launch import gather_from_ranks, on_first_rank
from dora_vl.run.settings import RunConfig
from dora_vl.training.opened import Opened
from dora_vl.training.ways.rollouts import DrawnAnswer, Group, prompt_of

SETTING = "objective.vllm"
AS_WRITTEN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""This chat template writes a prompt as it is: the run's own template has been applied to it."""
COMPLETIONS = "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
REQUESTS = 64
"""The server has this many questions at the same time; it batches their answers itself."""
WAITS = (2.0, 8.0)
"""Seconds before another attempt at what may pass: a lost connection, or an error of the server's own."""
NEVER = -100.0
"""This bias, the lowest that vLLM takes, keeps a token from being drawn."""


def start_command(base: str, rank: int) -> str:
    """Returns the command that starts a server for a run."""
    largest = next((of for of in VLLM_RANKS if of >= rank), VLLM_RANKS[-1])
    return (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server "
        f"--model {base} --enable-lora --max-lora-rank {largest} --trust-request-chat-template"
    )


@dataclass(frozen=True)
class VllmServer:
    """Talks to a vLLM server.

    Attributes:
        start: the command that would have started it as it must be, for messages.
        timeout: a server that is silent for so many seconds is given up.
    """

    url: str
    start: str
    timeout: float

    def check(self, base: str) -> None:
        """Refuses a server that is not there, serves another base, or takes no adapters while it runs."""
        models = self.read("/v1/models", "data")["data"]
        roots = [str(model["root"]) for model in models if model.get("root") and not model.get("parent")]
        if not any(root == base or Path(root).absolute() == Path(base).absolute() for root in roots):
            raise SettingError(SETTING, f": {self.url} serves {short_names(roots)}, and model.base is {base}")
        if LOAD not in self.read("/openapi.json", "paths")["paths"]:
            raise SettingError(SETTING, f": {self.url} takes no adapters while it runs; start it with: {self.start}")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """Posts `body`, or gets what is at `path`; returns the answer's text. Tries again what may pass."""
        problem = ""
        for wait in (*WAITS, None):
            try:
                status, text = sent(self.url.rstrip("/") + path, body, self.timeout)
            except (OSError, HTTPException, ValueError) as error:
                problem = f"no vLLM answers at {self.url} ({one_line(str(error)) or type(error).__name__})"
                may_pass = not isinstance(getattr(error, "reason", error), (TimeoutError, ValueError))
            else:
                if status < 400:
                    return text
                problem = f"{self.url}{path} says {status}: {one_line(text, 300)}"
                may_pass = status >= 500 or status == 429
            if wait is None or not may_pass:
                break
            time.sleep(wait)
        raise SettingError(SETTING, f": {problem}; it is started with: {self.start}")

    def read(self, path: str, *keys: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Returns the JSON of an answer that has these keys."""
        text = self.ask(path, body)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, Mapping) or not all(answer.get(key) for key in keys):
            raise self.no_answer(path, f"what is there is no vLLM's: {one_line(text, 200)}")
        return answer

    def no_answer(self, path: str, problem: str) -> SettingError:
        """Makes the error for an answer that cannot be used."""
        return SettingError(SETTING, f": {self.url}{path}: {problem}; is a proxy between, or another server?")


def server_of(config: RunConfig) -> VllmServer:
    """Returns the server of a run's `objective.vllm`."""
    start = start_command(config.model.base, config.adapter.rank)
    return VllmServer(str(config.objective.vllm), start, config.objective.vllm_timeout)


def sent(url: str, body: Mapping[str, Any] | None, timeout: float) -> tuple[int, str]:
    """Returns the status and the text of a server's answer, an error's too.

    Raises OSError (TimeoutError among them), HTTPException, or ValueError for what is no URL.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        answer: Any = urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=timeout)
    except HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read().decode(errors="replace")


def refuse_unsent(model: Any) -> None:
    """Refuses a model that trains more than vLLM's slots can hold."""
    language = set(resolved_layers(model, "language"))
    others = {part.part for part in trained_parts(model) if not part.adapts}
    others |= {name for name, _ in adapted_layers(model) if name not in language}
    if others:
        raise SettingError(
            SETTING,
            f": vLLM only takes adapters of the language model's linear layers, but {short_names(sorted(others))} "
            "train too; set adapter.train_projector: false and adapter.targets: [language]",
        )


@dataclass(frozen=True, kw_only=True)
class VllmAnswers:
    """Draws by a vLLM server, which gets only the adapter. An `AnswerSource`.

    A step's adapter gets a name of its own: vLLM keeps what it computed for a prompt by the adapter's name.

    Attributes:
        reader: opens pictures; None if the model sees text only.
        preparation: makes a LLaVA-1.5's pictures, whose way here is not the one that its folder tells vLLM.
        names: holds the name of the adapter that the server has.
    """

    server: VllmServer
    backbone: Backbone[Any]
    encoder: Encoder
    example_of: Callable[[int], Any]
    reader: PictureReader | None
    preparation: ImagePreparation | None
    base: str
    max_new_tokens: int
    never: Collection[int]
    names: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, opened: Opened, backbone: Backbone[Any], never: Collection[int]) -> VllmAnswers:
        """Draws for a run by the server of `objective.vllm`."""
        config, encoder, preparation = opened.config, opened.encoder, None
        if encoder.sees_pictures and isinstance(encoder.processor, PieceProcessor):
            preparation = ImagePreparation.from_folder(
                config.model.base, aspect=config.model.image_aspect, revision=config.model.revision
            )
        return cls(
            server=server_of(config),
            backbone=backbone,
            encoder=encoder,
            example_of=opened.samples.example_of,
            reader=opened.reader if encoder.sees_pictures else None,
            preparation=preparation,
            base=config.model.base,
            max_new_tokens=config.objective.max_new_tokens,
            never=never,
        )

    def update_weights(self) -> None:
        """Sends the adapter as it is now."""
        (name, *_) = gather_from_ranks(f"step-{uuid.uuid4().hex}")

        def send() -> None:
            with tempfile.TemporaryDirectory(prefix="dora_vl-") as folder:
                save_adapter(self.backbone.model, Path(folder) / name, base_model=self.base)
                if self.names:
                    self.server.ask(UNLOAD, {"lora_name": self.names[-1]})
                self.server.ask(LOAD, {"lora_name": name, "lora_path": str(Path(folder) / name)})

        on_first_rank(send)
        self.names[:] = [name]

    def draw(self, samples: Sequence[Sample], group: int, seed: int) -> list[Group]:
        """See `AnswerSource`."""
        with ThreadPoolExecutor(REQUESTS) as requests:
            seeds = [sample_random(seed, 0, index).getrandbits(31) for index in range(len(samples))]
            return [*requests.map(partial(self._group, group), samples, seeds)]

    def _group(self, group: int, sample: Sample, seed: int) -> Group:
        example = cast(Example, self.example_of(sample.index))
        *turns, _ = example.turns
        text = self.encoder.prompts.render(turns, generation_prompt=True).text
        bos = self.encoder.prompts.bos_token
        _, pictures = self.reader.pictures(example.images) if self.reader else ([], [])
        if self.preparation:
            pictures = [self.preparation.as_picture(self.preparation.prepare(picture)) for picture in pictures]
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": as_png(picture)}} for picture in pictures
        ]
        body = {
            "model": self.names[-1],
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            "chat_template": AS_WRITTEN,
            "add_special_tokens": not (bos and text.startswith(bos)),
            "n": group,
            "max_tokens": self.max_new_tokens,
            "seed": seed,
            "logprobs": True,
            "return_token_ids": True,
            "logit_bias": {str(token): NEVER for token in self.never},
            # All that the base's folder may say differently.
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        }
        answer = self.server.read(COMPLETIONS, "prompt_token_ids", "choices", body=body)
        prompt = prompt_of(sample).input_ids.tolist()
        if answer["prompt_token_ids"] != prompt:
            raise UserError(
                f"{SETTING}: vLLM reads the prompt of sample {sample.id} as {len(answer['prompt_token_ids'])} tokens, "
                f"this run as {len(prompt)} that are not the same; it draws no answers for such a model: leave it out"
            )
        choices = [choice for choice in answer["choices"] if choice.get("token_ids") and choice.get("logprobs")]
        if len(choices) != group:
            raise self.server.no_answer(
                COMPLETIONS, f"sample {sample.id} has {len(choices)} answers with tokens, {group} were asked for"
            )
        return [self._drawn(choice) for choice in choices]

    def _drawn(self, choice: Mapping[str, Any]) -> DrawnAnswer:
        ids = torch.tensor(choice["token_ids"])
        log_probs = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
        return DrawnAnswer(
            ids=ids,
            text=self.encoder.decode(ids),
            log_prob=sum(log_probs),
            entropy=-sum(log_probs) / len(log_probs),  # its mean over many answers is the entropy
            is_cut=choice["finish_reason"] == "length",
        )


def as_png(picture: Image.Image) -> str:
    """Returns a picture, to the pixel, as the text that an OpenAI-compatible server takes."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
