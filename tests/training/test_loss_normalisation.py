"""Both loss normalisations against the step written out: one SGD step of rate 1 leaves minus the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dora_vl.backbones.model import open_backbone
from dora_vl.run.reading import read_run_file
from dora_vl.run.settings import RunConfig
from dora_vl.training.decoder_pipeline import DecoderPipeline
from tests.training.tiny_run import logged_losses, trained, weights_of, write_run, write_tiny_data

pytestmark = pytest.mark.usefixtures("one_thread")
PROJECTOR = "model.multi_modal_projector.linear_2.bias"


def micro_batches(config: RunConfig, size: int) -> list[dict[str, Any]]:
    pipeline = DecoderPipeline(config)
    arguments = pipeline.arguments()
    data = pipeline.data(pipeline.load(), arguments)
    samples: Any = data.train
    return [dict(data.collate([samples[i] for i in range(start, start + size)])) for start in range(0, 2 * size, size)]


@pytest.mark.parametrize("normalisation", ["micro_batch", "step_tokens"])
def test_loss_and_gradient_equal_the_step_written_out(tmp_path: Path, tiny_llava: Path, normalisation: str) -> None:
    data = write_tiny_data(tmp_path / "data", samples=4)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, data, training={"use_cpu": True})
    config = read_run_file(run_file, "--data.packing=plain")
    backbone = open_backbone(str(tiny_llava))
    bias = backbone.model.get_parameter(PROJECTOR)
    before = bias.detach().clone()
    sums, counts = [], []
    for batch in micro_batches(config, 2):
        # The library's own forward, all positions, shifted here.
        logits = backbone.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        sums.append(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        counts.append(int((targets != -100).sum()))
    assert counts[0] != counts[1]  # else the two ways would agree
    by_batch = (sums[0] / counts[0] + sums[1] / counts[1]) / 2
    by_token = (sums[0] + sums[1]) / sum(counts)
    assert abs(float((by_batch - by_token).detach())) > 1e-4
    expected = by_batch if normalisation == "micro_batch" else by_token
    (gradient,) = torch.autograd.grad(expected, [bias])

    folder = trained(
        run_file,
        f"--optim.loss_normalisation={normalisation}",
        "--optim.projector_learning_rate=1.0",
        "--training.optim=sgd",
        "--training.learning_rate=1.0",
        "--training.warmup_steps=0",
        "--training.lr_scheduler_type=constant",
        "--training.max_grad_norm=0",
        "--training.max_steps=1",
        "--training.per_device_train_batch_size=2",
        "--training.gradient_accumulation_steps=2",
        "--training.train_sampling_strategy=sequential",
        "--data.group_by_modality_length=false",
    )
    assert logged_losses(folder) == [pytest.approx(float(expected.detach()), abs=1e-5)]
    after = weights_of(folder)[f"base_model.model.{PROJECTOR}"]
    torch.testing.assert_close(before - after, gradient, atol=1e-6, rtol=1e-4)
