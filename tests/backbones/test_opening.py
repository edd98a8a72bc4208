"""Bases: composed ones open like downloaded ones, GGUF files as llama.cpp wrote them, none with a kernel of the hub."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from dora_vl.backbones.loading import load_tokenizer, read_language_model, with_image_token
from dora_vl.backbones.model import open_backbone
from dora_vl.backbones.specs import ComposeSpec, SmallLanguageModel
from dora_vl.backbones.tower_sources import compose_llava
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import UserError
from tests.backbones.conftest import VISION
from tests.backbones.tiny_language import SIZES, byte_tokenizer

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module", params=["tied", "untied"])
def language_folder(request, tmp_path_factory, new_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("language")
    new_tokenizer.save_pretrained(folder)
    (file := folder / "tokenizer.json").write_text(file.read_text().replace('"<image>"', '"<other>"'))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    tied = {"vocab_size": len(tokenizer), "tie_word_embeddings": request.param == "tied"}
    config = LlamaConfig(**{**SIZES, **tied})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    return folder


@pytest.fixture
def make_spec(language_folder: Path, vision_folder: Path) -> Callable[..., ComposeSpec]:
    def make(**changes: object) -> ComposeSpec:
        settings: dict[str, object] = {
            "vision_library": "transformers",
            "vision_name": str(vision_folder),
            "image_mean": MEAN,
            "image_std": STD,
            "language_model": str(language_folder),
        }
        return ComposeSpec(**{**settings, **changes})  # pyright: ignore

    return make


def test_clip_and_llama_open_with_plain_transformers(make_spec: Callable[..., ComposeSpec], tmp_path: Path) -> None:
    compose_llava(make_spec(), tmp_path / "llava")
    starts = {".".join(key.split(".")[:2]) for key in load_file(tmp_path / "llava" / "model.safetensors")}
    assert starts - {"language_model.lm_head"} == {  # as published LLaVAs have them
        "language_model.model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "vision_tower.vision_model",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]
    for path in (tmp_path / "llava").glob("*.json"):  # nothing of this machine is in it
        assert str(tmp_path.parent) not in path.read_text(), path.name
    backbone = open_backbone(str(tmp_path / "llava"))
    image = backbone.config.image_token_id
    ids = torch.tensor([[1, 300, image, image, image, image, 310]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ours = backbone.generate(ids, torch.ones_like(ids), pixel_values=pixels, max_new_tokens=5).tolist()
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    kinds = config["model_type"], config["text_config"]["model_type"], config["vision_config"]["model_type"]
    assert kinds == ("llava", "llama", "clip_vision_model")  # whose classes are transformers' own
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert plain.generate(input_ids=ids, pixel_values=pixels, **options)[:, ids.shape[1] :].tolist() == ours


def test_the_parts_are_the_given_ones(make_spec, tmp_path, language_folder, vision_folder) -> None:
    compose_llava(make_spec(projector_seed=3), tmp_path / "llava")
    model = open_backbone(str(tmp_path / "llava")).model
    language = LlamaForCausalLM.from_pretrained(language_folder)
    vision = CLIPVisionModel.from_pretrained(vision_folder)
    rows = language.config.vocab_size
    embedding = model.model.language_model.embed_tokens.weight
    assert len(embedding) % 64 == 0
    assert model.config.image_token_id == len(load_tokenizer(str(language_folder)))
    assert torch.equal(embedding[:rows], language.model.embed_tokens.weight)
    torch.testing.assert_close(embedding[rows], language.model.embed_tokens.weight.mean(0))
    assert torch.equal(model.lm_head.weight[:rows], language.lm_head.weight)
    assert (model.lm_head.weight is embedding) == language.config.tie_word_embeddings
    for name, value in vision.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value)
    torch.manual_seed(3)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, torch.nn.Linear(16, 32).weight)


def test_a_grid_tower_and_the_processor(make_spec: Callable[..., ComposeSpec], tmp_path: Path) -> None:
    tower = {"vision_library": "timm", "vision_name": "test_efficientnet", "vision_weights": "random"}
    spec = make_spec(**tower, grid_pool=2, image_size=96, dtype="bfloat16")
    compose_llava(spec, tmp_path / "llava")
    backbone = open_backbone(str(tmp_path / "llava"), dtype=torch.bfloat16)
    assert backbone.config.image_seq_length == 4
    assert (backbone.config.vision_feature_layer, backbone.config.vision_feature_select_strategy) == (-1, "full")
    assert {weight.dtype for weight in backbone.model.parameters()} == {torch.bfloat16}
    processor = AutoProcessor.from_pretrained(tmp_path / "llava", backend="pil")
    inputs = processor(text="a <image> b", images=torch.zeros(3, 60, 40).numpy(), return_tensors="pt")
    assert int((inputs["input_ids"] == backbone.config.image_token_id).sum()) == 4
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert torch.isfinite(loaded.float()(**inputs).logits).all()


def test_refusals(make_spec: Callable[..., ComposeSpec], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError):
        compose_llava(make_spec(), tmp_path / "there")
    with pytest.raises(UserError):
        compose_llava(make_spec(language_model=str(tmp_path / "nothing")), tmp_path / "llava")
    with pytest.raises(UserError):
        open_backbone(str(tmp_path / "nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_small_llama_is_made_with_its_vocabulary(make_spec, tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    write_examples(file, [Example(id="1", question="what color is it?", answers=(Answer(text="light blue"),))])
    sizes = {"vocabulary": 290, "width": 16, "layers": 2, "heads": 2, "feedforward": 8}
    small = SmallLanguageModel(texts=(str(file),), words=("[INST]",) * 2, init_std=0.2, **sizes)
    for name, seed in {"first": 3, "again": 3, "other": 4}.items():
        compose_llava(make_spec(language_model=None, small=small, projector_seed=seed), tmp_path / name)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = "language_model.model.layers.1.mlp.up_proj.weight"
    assert first[drawn].shape == (8, 16)
    assert first[drawn].std() == pytest.approx(0.2, rel=0.25)
    assert not torch.equal(first[drawn], other[drawn])
    tokenizer = load_tokenizer(str(tmp_path / "first"))
    assert tokenizer("light blue").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("light blue").input_ids[-1] != tokenizer.eos_token_id
    assert tokenizer.tokenize("[INST]<image>") == ["[", "INST", "]", "<image>"]
    backbone = open_backbone(str(tmp_path / "first"))
    image = backbone.config.image_token_id
    ids = torch.tensor([[0, image, image, image, image, 270]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert backbone.generate(ids, torch.ones_like(ids), pixel_values=pixels, max_new_tokens=3).shape[0] == 1


FILE = "model.gguf"


def written(folder: Path, kind: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """Writes a Qwen2 whose head is its table, its matrices as `kind`; returns the model and its tokenizer."""
    tokenizer = byte_tokenizer()
    sizes = {**SIZES, "intermediate_size": 64, "tie_word_embeddings": True, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    writer = gguf.GGUFWriter(folder / FILE, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokenizer))
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for name, value in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        raw = gguf.GGMLQuantizationType["F32" if value.dim() == 1 else kind]
        data = gguf.quants.quantize(value.detach().numpy(), raw)
        writer.add_tensor(f"{names.get_name(owner)}.{leaf}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


def test_float_weights_come_back_bit_by_bit(tmp_path: Path) -> None:
    model, tokenizer = written(tmp_path, "F32")
    language = read_language_model(str(tmp_path), gguf_file=FILE)
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert language.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(language.weights[name], value), name
    assert "quantization_config" not in language.config.to_dict()
    assert language.config.tie_word_embeddings
    assert language.config.name_or_path == ""
    text = "the correct answer"
    assert language.tokenizer(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids[1:]


def test_quantised_weights_are_unpacked_and_the_model_computes_with_them(tmp_path: Path) -> None:
    model, _ = written(tmp_path, "Q8_0")
    language = with_image_token(read_language_model(str(tmp_path), gguf_file=FILE, dtype=torch.bfloat16))
    words = model.config.vocab_size
    assert language.tokenizer.convert_tokens_to_ids("<image>") == len(language.tokenizer) - 1
    assert all(value.dtype == torch.bfloat16 for value in language.weights.values())
    assert len(language.weights["model.embed_tokens.weight"]) == language.config.vocab_size >= words
    again = type(model)(language.config)
    missing = again.load_state_dict({name: value.float() for name, value in language.weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    again.tie_weights()
    ids = torch.tensor([[5, 17, 40, 7]])
    with torch.no_grad():
        expected, logits = model(ids).logits, again.eval()(ids).logits[..., :words]
    # Eight bits a weight and then bfloat16: near, and not by chance.
    assert float((logits - expected).norm()) < 0.03 * float(expected.norm())


def test_no_such_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_language_model(str(tmp_path), gguf_file="nothing.gguf")


ROOT = Path(__file__).parents[2]
NO_MODELS = ("Config", "Tokenizer", "TokenizerFast", "Processor", "ProcessorPil", "PeftModel")


def loads(file: Path) -> list[str]:
    """The function that each `X.from_pretrained(...)` stands in, but those of configs, tokenizers and processors."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        next((made.name for made in reversed(functions) if call in ast.walk(made)), "")
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
        if not ast.unparse(call.func.value).endswith(NO_MODELS)
    ]


def test_one_function_opens_models() -> None:
    files = [
        file
        for folder in ("dora_vl", "tasks", "data_prep", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = [(str(file.relative_to(ROOT)), function) for file in files for function in loads(file)]
    assert found == [("dora_vl/backbones/loading.py", "load_pretrained")]


def test_nothing_asks_for_a_kernel_where_the_package_is_installed(tmp_path: Path) -> None:
    described = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    for folder in (tmp_path / "kernels", described.parent):
        folder.mkdir()
    shutil.copy(Path(__file__).with_name("fake_kernels.py"), tmp_path / "kernels" / "__init__.py")
    described.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("kernels_checks.py"))]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "USE_HUB_KERNELS": "YES"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
