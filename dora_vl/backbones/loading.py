"""Reads a causal language model from a folder, a hub id or a GGUF file; for a LLaVA, with the picture token."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_tiktoken_available

from dora_vl.adapters.base_weights import SCHEMES, kept_whole, quantised_layers
from dora_vl.core.config import Quantisation
from dora_vl.core.quantised import quantised_in, settle_quantised
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import UserError, needs_extra
from dora_vl.files import BRINGS_CODE, NO_OWN_CODE, check_model_folder, opening, whole_folder, why_not_read, write_json

SPACE_MARK = "▁"


def is_sentencepiece(file: Path) -> bool:
    """Tells whether a `tokenizer.model` is SentencePiece's; otherwise tiktoken, where installed, may read it.

    transformers tries both in silence, and says at the end that tiktoken is missing, whatever was wrong.
    """
    with needs_extra("sentencepiece", f"to be read, {file}"):
        from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        if is_tiktoken_available():
            return False
        raise UserError(
            f"{file} ({file.stat().st_size} bytes) is not a SentencePiece model; fetch it again (one that git-lfs has "
            "not pulled yet has about 130 bytes), or pip install tiktoken if it is tiktoken's"
        ) from error
    return True


def as_sentencepiece(tokenizer: PreTrainedTokenizerBase, settings_file: Path | None) -> PreTrainedTokenizerBase:
    """Rebuilds the tokenizer with SentencePiece's own space marks; one of another class stays as it is.

    `legacy` in its `tokenizer_config.json` says whether the text after a special token gets a space mark too; by
    default it does, as in every transformers before 5.
    """
    if not isinstance(tokenizer, LlamaTokenizer):
        return tokenizer
    settings = {} if settings_file is None else json.loads(settings_file.read_text(encoding="utf-8"))
    legacy = settings.get("legacy")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:  # normalised as well, "</s>" in a text would have to read "▁</s>"
        token["normalized"] = token["normalized"] and not token["special"]
    backend = Tokenizer.from_str(json.dumps(state))
    mark_spaces(backend, legacy=legacy is None or legacy, prefix=settings.get("add_prefix_space") is not False)
    carried = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        **{name: getattr(tokenizer, name) for name in carried},
    )


def mark_spaces(tokenizer: Tokenizer, *, legacy: bool, prefix: bool) -> None:
    """Replaces each space by `▁` and puts one in front, also where the text begins with a space.

    `legacy` puts it before every stretch between special tokens (as the published `tokenizer.json` files do), else
    only before a stretch that begins the text. Only a `Metaspace` can tell which stretch begins the text, and it puts
    its mark only where there is none yet: so the first one marks with a space, which the second makes a `▁`.
    """
    spaces = normalizers.Replace(" ", SPACE_MARK)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE_MARK)] if prefix else []), spaces])
        tokenizer.pre_tokenizer = None
        return
    tokenizer.normalizer = spaces
    first = pre_tokenizers.Metaspace(" ", prepend_scheme="first" if prefix else "never", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="never", split=False)]
    )


VOCABULARY_MULTIPLE = 64  # rows of an embedding that has to grow; matrix products like it
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Any of these holds a tokenizer's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model's weights and what belongs to them, ready to become part of something else."""

    config: PreTrainedConfig
    weights: dict[str, Tensor]
    """Names are the causal model's: `model.…` and, where it is not tied to the embedding, `lm_head.weight`."""
    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase


def load_tokenizer(
    folder: str, *, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads a folder's tokenizer exactly as its `tokenizer.json` says, or else as its `tokenizer.model` does.

    transformers 5 rebuilds LLaMA's tokenizer from the vocabulary; the result splits a text that begins with a space (as
    after a picture) differently from either file.
    """
    try:
        if gguf_file is not None:
            return AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, **NO_OWN_CODE)
        if _file(folder, "tokenizer.json", revision):
            return PreTrainedTokenizerFast.from_pretrained(folder, revision=revision or "main")
        model = _file(folder, "tokenizer.model", revision)
        sentencepiece = model is not None and is_sentencepiece(model)
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision or "main", **NO_OWN_CODE)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # `opening` has the reasons
        reason = why_not_read(error)
        if reason != BRINGS_CODE:
            reason = _without_tokenizer(folder) or reason
        raise UserError(f"no tokenizer could be read from {folder!r}: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where it finds no file
        raise UserError(f"no tokenizer could be read from {folder!r}: {_without_tokenizer(folder)}")
    if sentencepiece:
        return as_sentencepiece(tokenizer, _file(folder, "tokenizer_config.json", revision))
    return tokenizer


def _without_tokenizer(folder: str) -> str:
    """Returns the message that a folder has no tokenizer's file; empty for other folders and hub ids."""
    if not Path(folder).is_dir() or any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        return ""
    return f"none of {', '.join(TOKENIZER_FILES)} is there; copy the tokenizer's files from where the model comes from"


def _file(folder: str, name: str, revision: str | None) -> Path | None:
    path = cached_file(folder, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def load_pretrained(model_class: Any, folder: str | Path, *, hint: str = "the folder is broken", **options: Any) -> Any:
    """Loads a model of transformers in eval mode, its modules as its class has them; every model is opened here.

    `use_kernels=False`: transformers 5.25 otherwise puts kernels from the hub, made for inference, in their place.
    """
    model, report = model_class.from_pretrained(
        folder, output_loading_info=True, use_kernels=False, **NO_OWN_CODE, **options
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} weights are missing, first {missing[:3]}; {hint}")
    return model


def with_image_token(language: LanguageModel) -> LanguageModel:
    """Adds `<image>` to a language model's vocabulary, for a LLaVA."""
    add_image_token(language.tokenizer)
    size, weights = len(language.tokenizer), language.weights
    if size > language.config.vocab_size:
        rows = math.ceil(size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        for name in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            # Each new row is the mean of the old ones: no new token is conspicuous before it is trained.
            old = weights[name]
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat([old, mean.expand(rows - len(old), -1)])
        language.config.vocab_size = rows
    return language


def read_language_model(
    folder: str, *, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Reads a causal language model of a folder or hub id, or a GGUF file in the folder, which is dequantised.

    Without `dtype` the weights keep their own (float32 for GGUF).
    """
    tokenizer = load_tokenizer(folder, gguf_file=gguf_file)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if gguf_file is None:
        check_model_folder(folder)
    else:  # float32: what dequantising computes in; the caller's dtype follows below, rounded once
        options = {"gguf_file": gguf_file, "dtype": torch.float32, **_dequantised()}
    with opening(f"no causal language model could be read from {folder!r}"):
        model = load_pretrained(AutoModelForCausalLM, folder, **options)
    # A GGUF model's config says it is quantised, though its weights no longer are.
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    weights = {name: value.to(dtype or value.dtype) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    config.name_or_path = ""  # a path of this machine
    return LanguageModel(
        config=config, weights=weights, generation=copy.deepcopy(model.generation_config), tokenizer=tokenizer
    )


def filled(model: PreTrainedModel, weights: dict[str, Tensor], language: LanguageModel) -> None:
    """Fills a model on the meta device with weights, and with the language model's generation settings."""
    if model.config.tie_word_embeddings:
        embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights["lm_head.weight"] = weights[embedding]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = next(iter(language.weights.values())).dtype
    if language.generation is not None:
        model.generation_config = language.generation


def _dequantised() -> dict[str, Any]:
    """Returns the argument that makes transformers unpack a GGUF file; versions without `GgufConfig` always do."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of `<image>`, which becomes a special token of this tokenizer if it is not one yet."""
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, normalized=False, special=True)], special_tokens=True)
    token_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    return int(token_id)


log = logging.getLogger(__name__)


def check_quantised(model: nn.Module, layers: Sequence[str]) -> None:
    """Checks that these layers are quantised, and no others."""
    settle_quantised(model)
    quantised = {name for name, _, _ in quantised_in(model)}
    if other := sorted(quantised ^ set(layers)):
        raise UserError(
            f"model.quantisation: {len(quantised)} layers are quantised instead of {len(layers)}, first "
            f"{other[:2]}; this model cannot be quantised here, set model.quantisation: null"
        )


def quantised_loading(
    folder_or_id: str, quantisation: Quantisation | None, *, dtype: torch.dtype, revision: str | None
) -> tuple[Sequence[str], dict[str, Any]]:
    """Returns the layers that `model.quantisation` means, and arguments for `from_pretrained`; no weight is read."""
    if quantisation is None:
        return (), {}
    config: Any = PreTrainedConfig.get_config_dict(folder_or_id, revision=revision or "main")[0]
    linears = quantised_layers(config, quantisation, folder_or_id)
    layers = linears.quantised
    if linears.too_narrow:
        log.warning(
            "%d of the language model's %d linear layers stay whole, first %s: %s takes widths that are multiples "
            "of %d",
            len(linears.too_narrow),
            len(linears.too_narrow) + len(layers),
            linears.too_narrow[0],
            quantisation,
            SCHEMES[quantisation].width,
        )
    skipped = kept_whole(config, layers, folder_or_id)
    bits = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if quantisation == "nf4":
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=skipped,
        )
    return layers, {"quantization_config": bits}


SETTINGS_FILE = "made_from.json"


@contextlib.contextmanager
def written_base(folder: Path, spec: Any) -> Iterator[Path]:
    """Yields a folder that gets its name, with a file that identifies `spec`, once the block ends."""
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or write to another place")
    with whole_folder(folder) as unfinished:
        yield unfinished
        write_json(unfinished / SETTINGS_FILE, _digests(spec))


def check_made_from(folder: Path, spec: Any) -> None:
    """Refuses a base that was written with other settings; one without settings is taken as it is."""
    file = folder / SETTINGS_FILE
    digests = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, digest in _digests(spec).items():
        if digests.get(name, digest) != digest:
            raise UserError(
                f"{folder} was made with another {name} than the run says ({getattr(spec, name)!r}); remove the folder "
                "to have it made anew, or name another model.base"
            )


def _digests(spec: Any) -> dict[str, str]:
    """Hashes each setting, so that a base that is passed on reveals no paths of the machine that made it."""
    settings = dataclasses.asdict(spec).items()
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in settings}
