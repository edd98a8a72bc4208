"""A benchmark put to a decoder of any kind: batched, greedily, or the likeliest letter of each question's choices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import FunctionType

from dora_vl.data.examples import Example
from dora_vl.evaluation.ask import Asking, ask
from dora_vl.evaluation.asker import Asked
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.choose_letters import choose_letters
from dora_vl.evaluation.evaluation_set import EvaluationSet
from dora_vl.evaluation.predict import predict
from dora_vl.evaluation.prompts import Prompt, turns_of
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.shown import MediaReader, videos_placed
from dora_vl.run.video_reading import VideoReading
from dora_vl.vision.frame_sampling import Uniform

MIDDLE_FRAME = "middle_frame"
"""In an example's `extra`: the picture that LLaVA-1.5 takes for its video."""


def ask_decoder(assistant: Assistant, one: EvaluationSet, asking: Asking) -> Asked:
    """Puts a benchmark's questions to the model; see `Asker.ask`."""
    prompt = one.benchmark.prompt
    examples = [with_middle_frame(example) for example in one.examples if example.id not in one.unreadable]
    same = asking.frames if assistant.prompts.videos_of_one_length else None
    videos = VideoReading(folder=asking.pictures, sampling=Uniform(asking.frames), frames=same)
    media = MediaReader(folder=asking.pictures, videos=videos)
    decoding = assistant.decoding(
        batch_size=asking.batch_size, max_new_tokens=asking.max_new_tokens, workers=asking.workers
    )
    choices = {example.id: len(example.choices) for example in examples}
    way = partial(choose_letters, choices=choices) if asking.by_likelihood else predict
    try:
        asked = ask(
            [question(example, prompt) for example in examples],
            lambda share, file: way(assistant, share, media=media, file=file, decoding=decoding),
            folder=asking.folder,
            settings={
                **asking.settings(one),
                "prompt": prompt.__name__ if isinstance(prompt, FunctionType) else repr(prompt),
                **({"frames": asking.frames} if any(example.clips for example in examples) else {}),
                **({"answers": "likelihood"} if asking.by_likelihood else {}),
            },
        )
    finally:
        media.close()
    return replace(asked, failed={**one.unreadable, **asked.failed})


def with_middle_frame(example: Example) -> Example:
    """The example with its video's middle frame as its picture, where the record names one, as SEED-Bench's do."""
    frame = example.extra.get(MIDDLE_FRAME)
    if example.video is None or not isinstance(frame, str):
        return example
    return replace(example, images=(frame,), video=None)


def question(example: Example, prompt: Prompt) -> Question:
    """An example as the model is asked it."""
    truth = example.answers[0].text if example.answers else ""
    kind = example.extra.get("kind")
    return Question(
        id=example.id,
        images=example.images,
        turns=tuple(videos_placed(turns_of(example, prompt), len(example.clips))),
        truth=truth,
        kind=None if kind is None else str(kind),
        videos=example.clips,
    )
