"""Writes the table of docs/starting.md: memory and step time of 7B, 13B and 32B runs on 1 to 64 GPUs.

    python -m benchmarks.cluster_table
    python -m benchmarks.cluster_table --into docs/starting.md

The figures are estimates of `dora-vl estimate`; no weight is read. It takes seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import table
from dora_vl.run.reading import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import Cluster, plan_run, with_shape
from dora_vl.training.memory import GIB

MODELS = {"LLaVA-1.5 7B": "llava-1.5-7b", "LLaVA-1.5 13B": "llava-1.5-13b", "Qwen2.5-VL 32B": "qwen2.5-vl-32b"}
STAGES = ("zero2", "zero3")
SETTINGS = (
    "--adapter.rank=64",
    "--data.train=my.json",
    "--data.max_tokens=2048",
    "--training.per_device_train_batch_size=4",
    "--training.gradient_checkpointing=true",
)
"""Each row is a run with DoRA on all linears of the language model and 4 samples of 2,048 tokens on each GPU a step."""
FLOP_PER_SECOND, UTILISATION, BANDWIDTH, NETWORK = 312e12, 0.4, 230e9, 100e9
"""The figures are an A100's in bfloat16, its NVLink's, and those of four 200 Gbit/s links a machine."""
HEADS = ("model", "GPUs", "GiB a GPU, zero2", "zero3", "s a step, zero2", "zero3")
BEGIN, END = "<!-- benchmarks.cluster_table -->\n\n", "\n<!-- end -->\n"


def rows() -> Iterator[tuple[str, ...]]:
    """Estimates GiB a GPU and seconds a step, for each model and number of GPUs under both stages."""
    for name, shape in MODELS.items():
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            for stage in STAGES:
                config = read_run([f"--model.base={shape}", f"--training.deepspeed={stage}", *SETTINGS])
                runs.append(plan_run(DecoderPipeline(with_shape(config, shape, Path(folder)))))
        for gpus in (1, 8, 64):
            estimates = [run.on(gpus) for run in runs]
            cluster = Cluster(-(-gpus // 8), FLOP_PER_SECOND, UTILISATION, BANDWIDTH, NETWORK)
            traffic = [run.traffic(gpus) for run in runs]
            seconds = [sum(cluster.seconds(sent, run.flop())) for sent, run in zip(traffic, runs, strict=True)]
            yield (
                name,
                f"{gpus}",
                *(f"{estimate.total / GIB:.1f}" for estimate in estimates),
                *(f"{each:.2f}" for each in seconds),
            )


def put_into(page: Path, text: str) -> None:
    """Replaces what stands between the page's two marks by the table."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Prints the table, or writes it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="a page with the two marks between which it stands")
    into = parser.parse_args().into
    text = table(HEADS, list(rows())) + "\n"
    print(text)
    if into is not None:
        put_into(into, text)


if __name__ == "__main__":
    main()
