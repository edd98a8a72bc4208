"""A vision-language model with an adapter, or a model alone, as lmms-eval's model `dora_vl`.

    python -m lmms_eval --model dora_vl --model_args adapter=runs/demo/adapter --tasks pope --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models`. Pictures and videos go through the run's own encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from dora_vl.data.samples import Sample
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictor import Shown

NEW_TOKENS = 64
REQUEST = ("model", "base", "any_base", "template", "strength")
MODEL = ModelManifest(model_id="dora_vl", chat_class_path=f"{__name__}.AdaptedModel")
"""The entry point `lmms_eval.models` names this."""


class AdaptedModel(lmms):
    """Answers lmms-eval's messages greedily.

    Args:
        adapter: an adapter folder; or else `model`, a model's folder or hub id, asked without one.
        base, any_base, template, strength: as `dora-vl ask` has them.
        frames: of a video that are shown.
    """

    is_simple = False

    def __init__(self, adapter: str | None = None, frames: int = 8, batch_size: int | str = 1, **options: Any) -> None:
        super().__init__()
        stated = {name: options[name] for name in REQUEST if name in options}  # lmms-eval adds options of its own
        request = ModelRequest(adapter=None if adapter is None else Path(adapter), **stated)
        assistant: Any = open_model(request).adapted
        self.assistant: Assistant = assistant
        self.batch_size, self._sampling, self._reader = int(batch_size), Uniform(frames), VideoReader()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers the requests in their order, each up to the first text of its `until`."""
        answers: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch_size), desc="answers", unit="batch"):
            rows = [request.args for request in requests[start : start + self.batch_size]]
            samples = [
                self._sample(messages(self.task_dict[task][split][number]))
                for _, messages, _, number, task, split in rows
            ]
            options: list[Mapping[str, Any]] = [row[2] for row in rows]
            longest = max(int(option.get("max_new_tokens", NEW_TOKENS)) for option in options)
            batch = self.assistant.prompts.collate(samples, "left")
            texts = self.assistant.answers(batch, max_new_tokens=longest)
            answers += [_until(text or "", option) for text, option in zip(texts, options, strict=True)]
        return answers

    def _sample(self, messages: Sequence[Mapping[str, Any]]) -> Sample:
        turns, pictures, videos = [], [], []
        for message in ChatMessages(messages=messages).messages:
            text = ""
            for part in message.content:
                if part.type == "image":
                    pictures.append(part.url.convert("RGB"))
                elif part.type == "video":
                    clip = Clip(
                        path=str(Path(part.url).resolve()), start_seconds=part.start_time, end_seconds=part.end_time
                    )
                    videos.append(self._reader.read(Path("/"), clip, self._sampling))
                text += {"image": f"{IMAGE_PLACEHOLDER}\n", "video": f"{VIDEO_PLACEHOLDER}\n"}.get(
                    part.type
                ) or part.text
            turns.append(Turn(message.role, text))
        return self.assistant.prompts.sample(turns, Shown(pictures=tuple(pictures), videos=tuple(videos)))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuses tasks that compare likelihoods."""
        raise NotImplementedError("dora_vl answers in words; take a task of lmms-eval that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses tasks that ask again after an answer."""
        raise NotImplementedError("dora_vl answers one question at a time")


def _until(text: str, options: Mapping[str, Any]) -> str:
    """Returns the answer up to where the task says that it ends."""
    stops = options.get("until") or ()
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()
