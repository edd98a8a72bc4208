"""What every tiny family shares: its row in `families.yaml`, and how config and processor are made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import yaml
from packaging.version import Version
from transformers import PreTrainedTokenizerFast

TABLE: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text(encoding="utf-8"))
SPECIAL: tuple[str, ...] = tuple(TABLE["special"])
TEXT: Mapping[str, Any] = TABLE["shared"]["text"]


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made, and what is known of it."""

    config: Mapping[str, Any]
    parts: list[Any]
    """The processor's class, its parts in order, and its options."""
    picture: str = "<image>"
    """The chat template writes this for a picture."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the family's processor asks its tokenizer for, by their names there."""
    format: str | None = None
    """The prompt format that stands in for a chat template; a family with one is written without a template."""
    adapted: int = 14
    """Linear layers of the tiny decoder: the seven of LLaMA, twice."""
    idle: tuple[str, ...] = ()
    """Beginnings of names that train and take part in no picture's features."""
    unadapted: str = ""
    """What holds weights of the decoder and is no linear layer."""
    projector: bool = True
    """True if a module between vision and language trains."""
    slow: bool = False
    """True if its tests take more than ten seconds."""
    merges: bool = True
    """True if an adapter can be merged: not where transformers splits the files' tensors when it loads them."""
    video: bool = False
    """True if the processor takes videos as such; else their frames go in as pictures."""
    peft: bool = True
    """True if PEFT opens an adapter of it; else it refuses the folder."""
    unstored: str = ""
    """Why the outputs of its frozen vision parts cannot be stored; empty where they can."""
    plain_rows: str = ""
    """Why rows of several samples do not fit it; empty where they do."""
    remark: str = ""
    since: str = ""
    """The first version of transformers that has it, where an older one is taken too."""

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        """Makes the family's processor of the tokenizer."""
        return built(self.parts, tokenizer)


def why_not_here(since: str) -> str:
    """Why a test of what came with a version of transformers is skipped; nothing where this one has it."""
    if since and Version(transformers.__version__) < Version(since):
        return f"right from transformers {since} on, and this is {transformers.__version__}"
    return ""


def resolved(settings: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Settings of a `Family.config` with the tokenizer's numbers."""
    if isinstance(settings, Mapping):
        return {name: resolved(value, tokenizer) for name, value in settings.items()}
    if isinstance(settings, list):
        return [resolved(value, tokenizer) for value in settings]
    if isinstance(settings, str) and settings.startswith("@"):
        return tokenizer.convert_tokens_to_ids(settings[1:])
    if isinstance(settings, str) and settings.startswith("=size"):
        return len(tokenizer) + int(settings.removeprefix("=size") or 0)
    return settings


def built(parts: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Makes what a list that begins with a class of transformers stands for; `set` holds attributes for afterwards."""
    if parts == "tokenizer":
        return tokenizer
    if not isinstance(parts, list) or not str(parts[0]).endswith(("Processor", "Extractor")):
        return parts
    positional = [built(part, tokenizer) for part in parts[1:] if not isinstance(part, dict)]
    named = {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}
    later = named.pop("set", {})
    made = getattr(transformers, parts[0])(*positional, **{k: built(value, tokenizer) for k, value in named.items()})
    for name, value in later.items():
        setattr(made, name, value)
    return made
