"""The data of a run about talk and pictures, whatever its model: read once, as tables or as a stream."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image
from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.image_text_encode import ImageTextEncoder
from dora_vl.backbones.prompt_table import InstructionEncoder
from dora_vl.data.example import Example
from dora_vl.data.order import (
    SamplingLengths,
    longest_places,
    places_of_largest_pictures,
    sampling_lengths,
    train_files,
    train_name,
)
from dora_vl.data.pictures import HeldPictures, MediaFolder, RowPictureBytes, StoredPictures, any_is_there, path_inside
from dora_vl.data.samples import FIRST, ConversationDataset, Examples, Labelled, Sample, Skipped, look_ahead
from dora_vl.data.stream import SampleStream, StreamedDataset, StreamOrder, StreamSource
from dora_vl.data.table import ExampleTable, characters_of, described, load_rows, overlap, overlap_warning
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.watch import questions_of_rows, watch_assistant
from dora_vl.files import content_key
from dora_vl.training.arguments import order_seed
from dora_vl.training.assembly import (
    build_sampler,
    check_streaming,
    image_folder,
    open_stream,
    read_samples,
    read_validation,
    samples_of_a_run,
    video_folder,
)
from dora_vl.training.memory import Activations, decoder_activations
from dora_vl.training.pipeline import NextTokenLoss, Pipeline, Reading, TrainingData
from dora_vl.training.recipe import CommonsenseRunConfig, RunConfig
from dora_vl.training.watching import Watch, evenly

MakeDataset = Callable[[Examples, HeldPictures], ConversationDataset]
"""The data set of some rows, and of the pictures that they hold themselves; worker processes may have it."""

Encoder = LlavaEncoder | ImageTextEncoder | InstructionEncoder
InstructConfig = RunConfig | CommonsenseRunConfig
Settings = TypeVar("Settings", bound=InstructConfig)

logger = logging.getLogger(__name__)

HASHED_ROWS = 2_000
"""At even distances, whose pictures and videos a resume compares: a second's work, a few more from a network's disk."""
FIRST_ROWS = 1_000
"""Where none of their pictures is in the folder, it is another one."""


class InstructData:
    """A run's training and validation samples.

    Args:
        config: the run's settings.
        arguments: its arguments; their seed is that of every order.

    Raises:
        UserError: data that cannot be read, and settings that do not go together.
    """

    def __init__(self, config: InstructConfig, arguments: TrainingArguments) -> None:
        self._config = config
        self._arguments = arguments
        self._train: ExampleTable | None = None
        self._stream: SampleStream | None = None
        if config.data.streaming:
            check_streaming(config.data)
            self._stream = open_stream(config.data, seed=order_seed(arguments))
            self._total = samples_of_a_run(self._stream, config.data, arguments)
            self._held_out = read_validation(config.data)
        else:
            self._train, self._held_out = read_samples(config.data, seed=order_seed(arguments))

    @property
    def has_pictures(self) -> bool:
        """Whether any training sample has a picture; of a stream nobody knows, so it counts as one that has."""
        return self._train is None or self._train.has_pictures

    @property
    def has_videos(self) -> bool:
        """Whether any sample names a video; of a stream the first rows tell (`SampleStream.has_videos`)."""
        tables = [table.has_videos for table in (self._train, self._held_out) if table is not None]
        return any(tables) or (self._stream is not None and self._stream.has_videos)

    @property
    def pictures(self) -> list[str]:
        """All that tables name, each once."""
        tables = [table for table in (self._train, self._held_out) if table is not None]
        return list(dict.fromkeys(name for table in tables for name in table.pictures))

    @property
    def stored(self) -> StoredPictures:
        """Those that the tables' files hold themselves."""
        return StoredPictures.joined([table.stored for table in (self._train, self._held_out) if table is not None])

    @property
    def held_out(self) -> ExampleTable | None:
        """Those whose loss is measured while training."""
        return self._held_out

    def shown_in(self, sample: Sample | Skipped) -> Question:
        """What a training sample shows, as a question without words; of a stream its pictures alone."""
        images = sample.images if isinstance(sample, Sample) else ()
        turn = (Turn("user", ""),)
        example = None if self._train is None or isinstance(sample, Skipped) else self._train[sample.index]
        videos = example.videos if isinstance(example, Example) else ()
        return Question(id=sample.id, images=images, turns=turn, truth="", videos=videos)

    def describe(self) -> None:
        """Says of each file what it holds, and what is held out."""
        data, seed = self._config.data, order_seed(self._arguments)
        if self._stream is not None:
            for source in self._stream.sources:
                for line in source.described():
                    logger.info(line)
            return
        for file in train_files(data.train):
            for line in described(file, load_rows(file.path, data.limit, columns=data.contract).rows):
                logger.info(line)
        if self._held_out is not None and data.validation_share:
            counts = len(self._held_out.rows), len(self._held_out.pictures), seed
            logger.info("%d samples of %d pictures held out for validation, chosen by seed %d", *counts)

    def look_ahead(self, *, pictures: MediaFolder | None = None, videos: MediaFolder | None = None) -> None:
        """Refuses training samples that a run over them would end for; see `data.look_ahead`. Of a stream none.

        Args:
            pictures: root of their paths.
            videos: likewise.
        """
        if pictures is not None and not pictures.root.is_dir():
            raise UserError(f"picture folder {pictures} does not exist; set data.image_folder")
        if self._train is None:
            return
        source = train_name(self._config.data.train)
        first = self._train.rows[:FIRST_ROWS]["images"] if pictures else []
        named = list(dict.fromkeys(name for names in first for name in names if name not in self._train.stored))
        if pictures is not None and named and not any_is_there(named, pictures.root):
            raise UserError(
                f"{source}: not one of its first {len(named):,} pictures is in {pictures}, such as {shown(named[0])}; "
                "set data.image_folder to the folder that their paths start from"
            )
        look_ahead(
            self._train,
            pictures=pictures,
            videos=videos,
            max_bad_share=self._config.data.max_bad_share,
            source=source,
        )

    def labelled(self, make: MakeDataset, encoder: Encoder) -> Iterator[Labelled]:
        """Yields the labels of the first training samples, and of the first with pictures.

        Args:
            make: samples of rows.
            encoder: what makes their labels.

        Raises:
            UserError: none of them can be used; with the first one's reason.
        """
        bad: list[Skipped] = []
        used = 0
        for example, sample in self._first(make):
            if isinstance(sample, Skipped):
                bad.append(sample)
                continue
            used += 1
            cut = len(sample.labels) == encoder.max_tokens
            answers, tokenizer = encoder.answers(example), encoder.tokenizer
            yield Labelled(id=sample.id, labels=sample.labels, answers=answers, tokenizer=tokenizer, cut=cut)
        if bad and not used:
            raise UserError(
                f"{train_name(self._config.data.train)}: none of its first {len(bad)} samples can be used; for example "
                f"{bad[0].id}: {bad[0].reason}"
            )

    def _first(self, make: MakeDataset) -> Iterator[tuple[Example, Sample | Skipped]]:
        if self._train is None:
            sources = () if self._stream is None else self._stream.sources
            examples = [row for source in sources for row in source.first_rows if isinstance(row, Example)]
            for place in _places([example.images for example in examples]):
                example = examples[place]
                yield example, make([example], RowPictureBytes(example.image_bytes))[0]
            return
        samples = make(self._train, self._train.stored)
        for place in _places(self._train.rows[:FIRST_ROWS]["images"]):
            example = self._train[place]
            if isinstance(example, Example):
                yield example, samples[place]

    def warn_of_overlap(self, questions: Sequence[Question], config: RunConfig) -> None:
        """Counts and names training samples that the test asks again; `config` says where its pictures are."""
        data, evaluation = config.data, config.evaluation
        if Path(evaluation.image_folder or data.image_folder).resolve() != Path(data.image_folder).resolve():
            return  # one name there is another picture
        if self._train is None:
            logger.warning(
                "data.streaming does not look ahead: whether training samples are asked again in %s is not known; "
                "`dora-vl check-data` on both files tells it",
                evaluation.file,
            )
        elif found := overlap(self._train.rows, questions):
            logger.warning(overlap_warning(found, train_name(data.train), str(evaluation.file)))

    def training_data(
        self,
        make: MakeDataset,
        *,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        tokens_per_image: int = 0,
        tokens_per_video: int = 0,
        share_pictures: bool = False,
        sized_pictures: MediaFolder | None = None,
    ) -> TrainingData:
        """What the Trainer takes.

        Args:
            make: samples of rows.
            collate: a batch of samples.
            tokens_per_image: with `tokens_per_video` for the lengths that group samples.
            share_pictures: whether the samples of a picture come in one batch.
            sized_pictures: root of the pictures' paths, where a larger picture becomes more tokens.
        """
        held_out = None if self._held_out is None else make(self._held_out, self._held_out.stored)
        if self._train is None:
            return self._streamed(make, collate, held_out)
        data, train = self._config.data, self._train
        lengths = sampling_lengths(train.rows, tokens_per_image=tokens_per_image, tokens_per_video=tokens_per_video)
        grouped = data.group_by_modality_length or share_pictures
        sampler = build_sampler(lengths, self._arguments, share_pictures=share_pictures) if grouped else None
        samples = make(train, train.stored)
        pools = partial(_pools, samples, train, lengths, self._micro_batch, grouped=grouped, sized=sized_pictures)
        return TrainingData(
            train=samples,
            pools=pools,
            validation=held_out,
            collate=collate,
            sampler=sampler,
            set_epoch=() if sampler is None else (sampler.set_epoch,),
            samples=len(train.rows),
            ids=train.ids,
            media=self._media_keys,
            source=train_name(data.train),
            longest_tokens=min(data.max_tokens, int(lengths.lengths.max())),
        )

    def _media_keys(self) -> dict[str, str]:
        """What the files of some training samples hold, by name; one that the data file holds is named after it."""
        if self._train is None or not isinstance(self._config, RunConfig):
            return {}
        data, keys = self._config.data, dict[str, str]()
        for example in self._train.select(range(0, len(self._train), math.ceil(len(self._train) / HASHED_ROWS))):
            if isinstance(example, Example):
                keys |= {name: _key(image_folder(data), name, self._train.stored) for name in example.images}
                keys |= {clip.path: _key(video_folder(data), clip.path, self._train.stored) for clip in example.videos}
        return keys

    @property
    def _micro_batch(self) -> int:
        return self._arguments.per_device_train_batch_size

    def _streamed(
        self,
        make: MakeDataset,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        held_out: ConversationDataset | None,
    ) -> TrainingData:
        if self._stream is None:
            raise RuntimeError("no stream has been opened")
        data, order = self._config.data, StreamOrder(self._stream, total=self._total)
        samples, sources = StreamedDataset(make, length=len(order)), self._stream.sources
        return TrainingData(
            train=samples,
            pools=lambda: [_of_first_rows(samples, sources, self._micro_batch)],
            validation=held_out,
            collate=collate,
            sampler=order,
            stream=order,
            set_epoch=(order.set_epoch,),
            samples=len(order),
            source=train_name(data.train),
            longest_tokens=data.max_tokens,
        )


def _places(images: Sequence[Sequence[str]]) -> list[int]:
    """Of the first samples, and of the first with pictures."""
    with_pictures = [place for place, names in enumerate(images) if names]
    return list(dict.fromkeys([*range(min(FIRST, len(images))), *with_pictures[:FIRST]]))


def _key(folder: MediaFolder, name: str, stored: HeldPictures) -> str:
    try:
        return "" if name in stored else content_key(path_inside(folder, name))
    except (BadSample, OSError):  # told of when it is read
        return ""


def _pools(
    samples: ConversationDataset,
    train: ExampleTable,
    lengths: SamplingLengths,
    count: int,
    *,
    grouped: bool,
    sized: MediaFolder | None,
) -> list[list[Sample | Skipped]]:
    """The largest samples, those with pictures and those without apart where no micro-batch mixes them.

    Twice as many as a micro-batch holds, since words only stand for tokens.
    """
    kinds = (lengths.is_multimodal, ~lengths.is_multimodal) if grouped else (None,)
    places = [longest_places(lengths, 2 * count, among) for among in kinds]
    if sized is not None:
        places[0] += places_of_largest_pictures(train.rows, train.stored, sized, count)
    return [[samples[place] for place in dict.fromkeys(one)] for one in places]


def _of_first_rows(samples: StreamedDataset, sources: Sequence[StreamSource], count: int) -> list[Sample | Skipped]:
    """The largest of a stream's first rows, twice as many as a micro-batch holds."""
    rows = [row for source in sources for row in source.first_rows]
    return [samples[row] for row in sorted(rows, key=characters_of, reverse=True)[: 2 * count]]


class InstructPipeline(Pipeline, Generic[Settings]):
    """What runs about talk and pictures share, whatever the model: settings, data read once, next-token loss."""

    def __init__(self, config: Settings, *, name: str = "llava_instruct") -> None:
        self._config = config
        self._name = name
        self._data: InstructData | None = None

    @property
    def name(self) -> str:
        """As `recipe.json` says it."""
        return self._name

    @property
    def config(self) -> Settings:
        """The run's settings."""
        return self._config

    def labelled(self, arguments: TrainingArguments) -> Iterator[Labelled]:
        """Those of its encoder."""
        return self._samples(arguments).labelled(*self._labelling(arguments))

    @abstractmethod
    def _labelling(self, arguments: TrainingArguments) -> tuple[MakeDataset, Encoder]:
        """What makes samples and their labels before the model is there."""

    def _samples(self, arguments: TrainingArguments) -> InstructData:
        """The run's data, read at the first call."""
        if self._data is None:
            self._data = InstructData(self.config, arguments)
        return self._data

    def activations(self, backbone: Backbone[Any], arguments: TrainingArguments, *, longest_tokens: int) -> Activations:
        """The language model's."""
        return decoder_activations(backbone.model, arguments, longest_tokens=longest_tokens)

    def loss(self, backbone: Backbone[Any]) -> NextTokenLoss:
        """Next-token loss."""
        return NextTokenLoss(backbone, step_tokens=self.config.optim.loss_normalisation == "step_tokens")

    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """Questions of the validation samples, or else of the test."""
        held_out, config = self._samples(arguments).held_out, self.config
        if held_out is None and config.evaluation.file is None:
            return None
        if held_out is not None:
            questions = questions_of_rows(held_out, config.watch)
        else:
            questions = evenly(self._test_questions(), config.watch)
        media = self._media(backbone, arguments, questions, None if held_out is None else held_out.stored)
        return watch_assistant(
            self._assistant(backbone),
            questions,
            media,
            max_new_tokens=config.evaluation.max_new_tokens,
            source=str(config.evaluation.file if held_out is None else config.data.held_out),
        )

    @abstractmethod
    def _assistant(self, backbone: Backbone[Any]) -> Assistant:
        """The model that trains, ready to be asked."""

    @abstractmethod
    def _test_questions(self) -> list[Question]:
        """All that the test asks."""

    @abstractmethod
    def _media(
        self,
        backbone: Backbone[Any],
        arguments: TrainingArguments,
        questions: Sequence[Question],
        stored: StoredPictures | None,
    ) -> MediaReader:
        """Reads what questions show.

        Args:
            stored: the pictures that the samples' own files hold; None: the questions are of the test.
        """

    def reading(self, backbone: Backbone[Any]) -> Reading:
        """Its encoder's tokenizer."""
        encoder: Any = self._assistant(backbone).prompts
        return Reading(encoder.encoder.tokenizer, self._places(backbone))

    @abstractmethod
    def _places(self, backbone: Backbone[Any]) -> frozenset[int]:
        """Ids that stand for a piece of a picture or a video."""

    def pictures_of(
        self, backbone: Backbone[Any], arguments: TrainingArguments, data: TrainingData, items: Sequence[Any]
    ) -> list[Callable[[], Image.Image] | None]:
        """The samples' own."""
        samples = self._samples(arguments)
        asked = [samples.shown_in(item) for item in items]
        media = self._media(backbone, arguments, asked, samples.stored)
        return [partial(media.picture, one) if one.images or one.videos else None for one in asked]
