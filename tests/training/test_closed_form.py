"""A projector's start and the probe against what is written out: normal equations, each row left out, a real LLaVA."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dora_vl.backbones.tower_sources import has_new_projector
from dora_vl.errors import SettingError
from dora_vl.run.folder import PROJECTOR_START
from dora_vl.training.extras import closed_form
from dora_vl.training.extras.closed_form import Ridge, Round, probe, projector_start
from tests.training.launched import launch
from tests.training.tiny_run import (
    assert_same_weights,
    logged_losses,
    losses_of,
    merged,
    refused_key,
    trained,
    weights_of,
    write_run,
    write_tiny_data,
)

CELL, HIDDEN, PICTURES = 10, 24, 40


@pytest.mark.parametrize(("rows", "width", "noise"), [(30, 6, 1), (12, 40, 12)])
def test_a_ridge_is_the_normal_equations_and_its_error_that_of_rows_left_out(rows, width, noise) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs = 3 + torch.randn(rows, width, generator=generator, dtype=torch.double) * torch.linspace(1, 4, width)
    targets = inputs[:, :2] @ torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]]).double() + 5
    targets += noise * torch.randn(targets.shape, generator=generator, dtype=torch.double)
    ridge = Ridge.fit(inputs, targets)
    standard, wanted = (inputs - inputs.mean(0)) / inputs.std(0, correction=0), targets - targets.mean(0)
    torch.testing.assert_close((inputs - ridge.mean) / ridge.spread, standard)
    # The penalty is not told, so it is found again: the normal equations give it from the weights.
    gradient, weights = standard.T @ (wanted - standard @ ridge.weights), ridge.weights
    penalty = float((gradient * weights).sum() / weights.square().sum())
    torch.testing.assert_close(gradient, penalty * weights)
    torch.testing.assert_close(ridge(inputs), standard @ weights + targets.mean(0))

    def left_out(penalty: float) -> float:
        error = 0.0
        for row in range(rows):
            rest = [other for other in range(rows) if other != row]
            center, offset = standard[rest].mean(0), wanted[rest].mean(0)
            x, y = standard[rest] - center, wanted[rest] - offset
            fitted = torch.linalg.solve(x.T @ x + penalty * torch.eye(width).double(), x.T @ y)
            error += float(((standard[row] - center) @ fitted + offset - wanted[row]).square().sum())
        return error / float(wanted.square().sum())

    assert ridge.unexplained == pytest.approx(left_out(penalty), rel=1e-6)
    for factor in (10**-0.5, 10**0.5):
        assert left_out(penalty * factor) > ridge.unexplained


def pictures_with_answers() -> tuple[list[Round], dict[tuple[str, ...], torch.Tensor], dict[str, torch.Tensor]]:
    """Rounds about pictures whose cells are of one of four kinds, what a projector gets of them, and embeddings."""
    generator = torch.Generator().manual_seed(5)
    kinds = 2 * torch.randn(4, CELL, generator=generator, dtype=torch.double)
    words = {name: torch.randn(HIDDEN, generator=generator, dtype=torch.double) for name in ("a", "b", "c", "d", "odd")}
    rounds: list[Round] = []
    seen: dict[tuple[str, ...], torch.Tensor] = {}
    for number in range(PICTURES):
        cells = 7 + kinds[number % 4] + 0.3 * torch.randn(6, CELL, generator=generator, dtype=torch.double)
        seen[f"{number}.png",] = torch.cat([cells.mean(0, keepdim=True), cells])
        rounds.append(((f"{number}.png",), "what is it?", "abcd"[number % 4]))
    return [*rounds, (("0.png",), "which one is it?", "odd")], seen, words


def projected(start: dict[str, torch.Tensor], cells: torch.Tensor) -> torch.Tensor:
    """What transformers' own projector makes of cells with these weights."""
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": CELL, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": 2},
    )
    projector = LlavaMultiModalProjector(config).double()
    projector.load_state_dict(start)
    return projector(cells).detach()


@pytest.mark.parametrize("form", ["answers", "scaled"])
def test_a_start_has_the_answers_mean_and_spread_and_answers_say_what_is_seen(form: str) -> None:
    rounds, seen, words = pictures_with_answers()
    torch.manual_seed(0)
    drawn = {
        f"linear_{number}.{leaf}": value.double()
        for number, layer in ((1, torch.nn.Linear(CELL, HIDDEN)), (2, torch.nn.Linear(HIDDEN, HIDDEN)))
        for leaf, value in layer.state_dict().items()
    }
    start = projector_start(rounds, seen, words, drawn, form)  # pyright: ignore[reportArgumentType]
    asked_often = torch.stack([words[text] for _, question, text in rounds if question == "what is it?"])
    everything = torch.stack([words[text] for _, _, text in rounds]).mean(0)
    said = asked_often - asked_often.mean(0)
    said[0] = (said[0] + words["odd"] - everything) / 2  # the first picture has two answers
    cells = torch.stack([seen[f"{number}.png",][1:] for number in range(PICTURES)])
    out = projected(start, cells)
    apart = out.flatten(0, 1) - everything
    torch.testing.assert_close(apart.square().sum(1).mean(), said.square().sum(1).mean(), atol=0.1, rtol=0)
    assert float(apart.mean(0).norm()) < 0.1 * float(said.norm(dim=1).mean())
    nearest = normalize(out.mean(1) - everything, dim=1) @ normalize(asked_often[:4] - asked_often.mean(0), dim=1).T
    right = (nearest.argmax(1) == torch.arange(PICTURES) % 4).float().mean()
    assert right == 1 if form == "answers" else right < 0.8
    if form == "answers":  # the pairs of hidden units are the linear map itself
        both = projected(start, cells[:1]) + projected(start, cells[1:2])
        torch.testing.assert_close(projected(start, (cells[:1] + cells[1:2]) / 2), both / 2)


def test_what_says_nothing_of_the_answers_keeps_its_random_map() -> None:
    rounds, seen, words = pictures_with_answers()
    chance = torch.Generator().manual_seed(1)
    noise = {names: torch.randn(7, CELL, generator=chance, dtype=torch.double) for names in seen}
    drawn = {f"linear_{n}.{leaf}": torch.ones(HIDDEN, *shape).double() for n, shape, leaf in (
        (1, (CELL,), "weight"), (1, (), "bias"), (2, (HIDDEN,), "weight"), (2, (), "bias"))}  # fmt: skip
    for several, shown in ((rounds, noise), ([(names, "always?", "a") for names, _, _ in rounds], seen)):
        starts = [projector_start(several, shown, words, drawn, form) for form in ("answers", "scaled")]
        assert all(torch.equal(starts[0][name], starts[1][name]) for name in drawn)
        assert all(tensor.isfinite().all() and tensor.any() for tensor in starts[0].values())


def test_the_probe_reads_each_question_by_its_own_map() -> None:
    rounds, seen, _ = pictures_with_answers()
    other = {"a": "left", "b": "left", "c": "right", "d": "right"}
    rounds = rounds[:-1] + [(names, "which side?", other[text]) for names, _, text in rounds[:-1]]
    train = [each for each in rounds if int(each[0][0].split(".")[0]) < 28]
    test = [each for each in rounds if each not in train]
    assert probe(train, test, seen) == [text for _, _, text in test]
    strange = [(("0.png",), "never asked?", "a"), (("gone.png",), "what is it?", "a")]
    assert probe(train, strange, seen) == [None, None]
    names = [(each[0], "what is it called?", f"name {number}") for number, each in enumerate(train)]
    assert probe(names, [(("0.png",), "what is it called?", "name 0")], seen) == [None], "names never come again"


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder / "vision")
    records = write_tiny_data(folder / "data")
    compose = {
        **{"vision_library": "transformers", "vision_name": str(folder / "vision")},
        **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        "small": {"texts": [str(records)], "width": 32, "layers": 2, "heads": 4, "feedforward": 64, "vocabulary": 400},
    }
    model, data = {"compose": compose, "template": "mistral_instruct"}, {"cache_features": True}
    run_file = write_run(folder / "run.yaml", folder / "base", records, model=model, data=data)
    run_file.write_text(run_file.read_text().replace("task: image_text", "task: llava"))
    return run_file


def test_a_new_projector_starts_at_the_answers_and_a_resumed_run_where_it_began(
    composed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = ("--training.save_strategy=steps", "--training.save_steps=3")
    caplog.set_level("INFO")
    whole = trained(composed, *saved, f"--training.output_dir={tmp_path / 'whole'}")
    assert "adapter.projector_start: answers" in caplog.text
    as_composed = trained(composed, "--adapter.projector_start=random", f"--training.output_dir={tmp_path / 'random'}")
    assert not (as_composed / PROJECTOR_START).exists()
    assert logged_losses(whole)[0] != logged_losses(as_composed)[0]
    # Stopped after three steps, it goes on from the start that it has.
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoint-6")
    with monkeypatch.context() as patch:
        patch.setattr(closed_form, "projector_start", lambda *_: pytest.fail("computed again"))
        trained(composed, *saved, "--resume=last", f"--training.output_dir={stopped}")
    assert_same_weights(stopped, whole)
    base = composed.parent / "base"
    assert has_new_projector(base)
    tuned = merged(whole / "adapter", tmp_path / "tuned")
    assert (tuned / "new_projector.json").is_file()
    assert not has_new_projector(tuned)
    kept = weights_of(whole)
    assert any("multi_modal_projector.linear_2.weight" in name for name in kept), "the folder holds it whole"
    words = (f"--model.base={tuned}", "--model.compose=null", f"--training.output_dir={tmp_path / 'refused'}")
    assert refused_key(composed, *words, "--adapter.projector_start=answers") == "adapter.projector_start"


@pytest.mark.parametrize("change", ["data.cache_features=false", "adapter.train_projector=false"])
def test_a_start_without_a_place_is_refused(composed: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(SettingError):
        trained(
            composed, "--adapter.projector_start=scaled", f"--{change}", f"--training.output_dir={tmp_path / 'run'}"
        )


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_start_where_one_does(composed: Path, tmp_path: Path) -> None:
    words = ["--data.group_by_modality_length=false", "--training.train_sampling_strategy=sequential"]
    words += ["--training.per_device_train_batch_size=2", "--training.max_steps=3"]
    alone = trained(
        composed, *words, "--training.gradient_accumulation_steps=2", f"--training.output_dir={tmp_path / 'one'}"
    )
    two = f"--training.output_dir={tmp_path / 'two'}"
    launch(composed, *words, two, "--training.deepspeed=zero3", ranks=2)
    torch.testing.assert_close(losses_of(tmp_path / "two"), losses_of(alone), atol=1e-4, rtol=0)
    starts = [load_file(folder / PROJECTOR_START) for folder in (alone, tmp_path / "two")]
    for name, tensor in starts[0].items():
        torch.testing.assert_close(starts[1][name], tensor, atol=1e-3, rtol=1e-3)
