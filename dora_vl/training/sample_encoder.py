"""Makes a decoder's samples: reads an example's pictures and videos, and encodes its words with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from dora_vl.backbones.encoder import Encoder, placeholder_picture
from dora_vl.backbones.frozen_outputs import OutputStore, PictureReader, with_stored_outputs
from dora_vl.backbones.video_inputs import within_pixels
from dora_vl.data.example import Example
from dora_vl.data.pictures import HeldPictures, MediaFolder, open_image
from dora_vl.data.samples import ConversationDataset, Encoded, Examples, Sample, TrainedAnswer
from dora_vl.data.table import ExampleTable
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.run.base import VideoReading


@dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """Makes samples of whole conversations; worker processes have it, too.

    Attributes:
        folder: root of the pictures' paths; None: the model sees words alone.
        most_pixels: a sample's pictures are shrunk to it.
        outputs: stored outputs of frozen vision parts.
        answers, prompts: the most that a sample holds of them.
    """

    encoder: Encoder
    folder: MediaFolder | None = None
    videos: VideoReading | None = None
    most_pixels: int | None = None
    outputs: OutputStore | None = None
    answers: int = 1
    prompts: int = 1

    def dataset(self, examples: Examples, stored: HeldPictures) -> ConversationDataset:
        """Makes the samples of some examples, and of the pictures that their files hold."""
        return ConversationDataset(examples, encode=partial(self.encode, stored=stored))

    def encode(self, example: Example, stored: HeldPictures, *, answers: bool = False) -> Encoded:
        """Encodes a conversation, or its last answer and the rejected `answers` alone. Raises BadSample.

        A picture with stored outputs only gives its size.
        """
        encode = self.encoder.encode_answers if answers else self.encoder.encode
        if self.folder is None or self.videos is None:
            if example.images or example.videos:
                raise BadSample(example.id, "it has pictures or videos, which a language model does not see")
            return encode(example)
        clips, outputs, lost = self.videos.read(example.videos) if example.videos else [], None, 0
        if self.outputs is not None and example.images:
            reader = PictureReader(encoder=self.encoder, folder=self.folder, stored=stored)
            outputs = self.outputs.read(reader, example.images)
            pictures = [placeholder_picture(size) for size in outputs.sizes]
        else:
            pictures = [open_image(self.folder, name, stored) for name in example.images]
        if self.most_pixels is not None:
            pictures, clips, lost = within_pixels(pictures, clips, self.most_pixels)
        encoded = dataclasses.replace(encode(example, pictures, clips), lost_pixels=lost)
        if outputs is None:
            return encoded
        texts = (encoded, *encoded.others)
        if any(0 < len(text.media) < len(example.images) for text in texts):
            reason = "its rounds are rows of their own, with fewer pictures than are stored together"
            raise BadSample(example.id, f"{reason}; set data.cache_features: false")
        first, *others = (with_stored_outputs(text, outputs.outputs) if text.media else text for text in texts)
        return dataclasses.replace(first, others=tuple(others))

    def trained(self, example: Example, sample: Sample, examples: Examples) -> list[list[TrainedAnswer]]:
        """Lists for each text of a sample what its labels must say; `examples` are those that it was made among."""
        answers = self.encoder.answers(example)
        return [[answers[number] for number in text.answers] for text in sample.rows()]


@dataclass(frozen=True, kw_only=True)
class AnswersEncoder(SampleEncoder):
    """Makes samples of a conversation's last answer, with the rejected ones beside it.

    Attributes:
        exchange: this seed draws another picture for the chosen answer (`objective.exchange_pictures`); or None.
    """

    exchange: int | None = None

    def dataset(self, examples: Examples, stored: HeldPictures) -> ConversationDataset:
        """Makes the samples of some examples, which also lend each other their pictures."""
        return ConversationDataset(examples, encode=partial(self.encode_answers, stored=stored, examples=examples))

    def encode_answers(self, example: Example, stored: HeldPictures, examples: Examples = ()) -> Encoded:
        """Encodes answers, and beside them those about other pictures, drawn among `examples`."""
        parts = self.by_pictures(example, examples)
        encoded = [self.encode(part, stored, answers=True) for part in parts]
        if self.exchange is not None and len(encoded) > 1 and not example.rejected_images:
            encoded[-1] = dataclasses.replace(encoded[-1], exchanged=True)
        first, *others = (answer for part in encoded for answer in (part, *part.others))
        return dataclasses.replace(first, others=tuple(others), lost_pixels=sum(part.lost_pixels for part in encoded))

    def by_pictures(self, example: Example, examples: Examples) -> list[Example]:
        """Splits an example by the pictures that its answers are about."""
        if not example.rejected:
            return [example]
        *prompt, chosen = example.turns
        if example.rejected_images:
            texts, images = example.rejected, example.rejected_images
            example = dataclasses.replace(example, rejected=())
        elif self.exchange is not None and isinstance(examples, ExampleTable):
            texts, images = (chosen.text,), examples.other_pictures(example, self.exchange)
        else:
            return [example]
        turns = (*prompt, Turn("assistant", texts[0]))
        other = dataclasses.replace(example, turns=turns, rejected=texts[1:], images=images, is_good=False)
        return [example, other] if images else [example]

    def trained(self, example: Example, sample: Sample, examples: Examples) -> list[list[TrainedAnswer]]:
        """Lists each answer by itself, as `SampleEncoder.trained` does."""
        parts = self.by_pictures(example, examples)
        turns = [(*example.turns[:-1], Turn("assistant", text)) for part in parts for text in _answers(part)]
        return [self.encoder.answers(dataclasses.replace(example, turns=each))[-1:] for each in turns]


def _answers(example: Example) -> tuple[str, ...]:
    return (example.turns[-1].text, *example.rejected)
