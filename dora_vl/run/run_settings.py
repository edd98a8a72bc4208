"""What training reads of a run's settings, whatever the backbone; the settings are in `recipe` and its two siblings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dora_vl.run.recipe import AdapterConfig, OptimConfig, SampleBound


@runtime_checkable
class ModelSection(Protocol):
    """What training reads of a run's `model:` section."""

    @property
    def base(self) -> str:
        """Folder or hub id of the model."""
        ...

    @property
    def dtype(self) -> str:
        """Number type of the frozen weights."""
        ...

    @property
    def may_be_quantised(self) -> bool:
        """Whether `quantisation` is a setting here, and not set."""
        ...


@runtime_checkable
class DataSection(Protocol):
    """What training reads of a run's `data:` section."""

    @property
    def held_out(self) -> str | None:
        """What the loss is measured on while training, for messages; None: nothing."""
        ...

    @property
    def max_bad_share(self) -> float:
        """Largest share of unusable samples."""
        ...

    @property
    def workers(self) -> int:
        """Processes that prepare samples."""
        ...

    @property
    def step_samples(self) -> int | None:
        """Samples of a step, where the data say so (`batch_size`); None: the training section does."""
        ...

    @property
    def sample_bounds(self) -> Mapping[SampleBound, int | None]:
        """The settings here that bound a sample's size, and what they are; None: not set."""
        ...


@runtime_checkable
class EvaluationSection(Protocol):
    """What training reads of a run's `evaluation:` section."""

    @property
    def file(self) -> str | None:
        """What the trained model is tested on; None: no test."""
        ...

    @property
    def batch_size(self) -> int:
        """Questions answered at once."""
        ...


@runtime_checkable
class RunSettings(Protocol):
    """The settings every run has, whatever its backbone; its sections may hold more."""

    @property
    def model(self) -> ModelSection:
        """The model."""
        ...

    @property
    def adapter(self) -> AdapterConfig:
        """What trains, and how."""
        ...

    @property
    def data(self) -> DataSection:
        """Training and validation data."""
        ...

    @property
    def optim(self) -> OptimConfig:
        """Learning rates by part."""
        ...

    @property
    def training(self) -> Mapping[str, Any]:
        """Fields of transformers.TrainingArguments."""
        ...

    @property
    def evaluation(self) -> EvaluationSection:
        """The test after training."""
        ...

    @property
    def resume(self) -> str | None:
        """The checkpoint to resume from."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether an earlier run's results go."""
        ...

    @property
    def test_only(self) -> bool:
        """Whether the adapter that is there is tested and nothing trained."""
        ...

    @property
    def watch(self) -> int:
        """How many fixed questions are answered through training."""
        ...

    @property
    def try_largest_batch(self) -> bool | None:
        """Whether the largest micro-batch is tried first; None: where there is a GPU."""
        ...
