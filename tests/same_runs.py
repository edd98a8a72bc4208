"""Holds a change of structure to its word: fixed runs leave the same bytes in two versions of the code.

    python tests/same_runs.py OTHER_CHECKOUT [RUN...]

Each run trains four steps and answers its test, once in this checkout and once in the other; the adapters, the losses
and the predictions must be equal to the last bit. Both use this file, the other checkout's tests write the tiny models.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).parents[1]
REWARD = """
def right_and_short(example, answer):
    return float(example.answers[0].text.split()[0] in answer) + float(len(answer) < 12)
"""


def decoder(folder: Path, kind: str) -> Path:
    """The folder of a finished run of a decoder."""
    from safetensors.torch import load_file, save_file

    from dora_vl.training.run import run
    from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
    from tests.training.tiny_run import decoder_run, write_pairs, write_run, write_tiny_data, write_tiny_llava

    base, sections = folder / "base", {}
    test = data = write_tiny_data(folder / "data", samples=16)
    if kind == "qwen2_5_vl":
        write_tiny("qwen2_5_vl", base)
    elif kind == "language":
        write_tiny_language("qwen2", base)
        rows = [{"question": f"Say {number}.", "answer": f"It is {number}."} for number in range(16)]
        test = data = folder / "data" / "texts.json"
        data.write_text(json.dumps(rows))
        sections = {"optim": {"projector_learning_rate": None}}
    else:
        write_tiny_llava(base)
    if kind == "dpo":
        data = write_pairs(folder / "pairs", samples=16)
        sections = {"objective": {"loss": {"dpo": 1, "sft": 0.5}, "beta": 0.5, "exchange_pictures": True}}
    if kind == "grpo":
        weights = load_file(base / "model.safetensors")
        weights["language_model.lm_head.weight"] *= 20
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        (folder / "own.py").write_text(REWARD)
        rewards = {f"{folder / 'own.py'}:right_and_short": 1.0}
        sections = {"objective": {"loss": "grpo", "group": 6, "max_new_tokens": 5, "kl": 0.1, "rewards": rewards}}
    training = {"max_steps": 4, "warmup_steps": 0, "use_cpu": True}
    evaluation = {} if kind == "dpo" else {"evaluation": {"file": str(test), "limit": 8}}
    run(decoder_run(write_run(folder / "run.yaml", base, data, training=training, **evaluation, **sections)))
    return folder / "run"


def vlbart(folder: Path) -> Path:
    """The folder of a finished run of VL-BART."""
    from dora_vl.training.run import run
    from tests.training.tiny_vlbart_run import vlbart_run, write_vlbart_data, write_vlbart_run

    data = write_vlbart_data(folder / "data")
    tasks = ("vqav2", "nlvr2", "tvqa")
    files = {"nlvr2": str(data / "records" / "nlvr2.jsonl")}
    training = {"use_cpu": True, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    file = write_vlbart_run(
        folder / "run.yaml", data, tasks, training=training, evaluation={"files": files, "batch_size": 4}
    )
    run(vlbart_run(file))
    return folder / "run"


RUNS: Mapping[str, Callable[[Path], Path]] = {
    **{
        kind: lambda folder, kind=kind: decoder(folder, kind)
        for kind in ("llava", "qwen2_5_vl", "language", "dpo", "grpo")
    },
    "vlbart": vlbart,
}


def digests(run_folder: Path) -> dict[str, str]:
    """Digests of what a run leaves; of the log only the losses, since times differ."""
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4, log
    files = [*sorted((run_folder / "adapter").glob("*.safetensors")), *sorted(run_folder.glob("predictions*.jsonl"))]
    contents = {path.name: path.read_bytes() for path in files} | {"losses": json.dumps(losses).encode()}
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in contents.items()}


def of_checkout(root: Path, names: list[str], work: Path) -> dict[str, dict[str, str]]:
    """Digests of the runs as a checkout makes them, each in a process of its own."""
    found = {}
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in names:
        folder = work / name  # the same path for both: it stands in what a run writes
        command = [sys.executable, __file__, "--run", name, str(folder)]
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"{name} in {root}:\n{ended.stderr[-3000:]}")
        found[name] = json.loads(ended.stdout.splitlines()[-1])
        folder.rename(work / f"{name}-done-{len(list(work.iterdir()))}")
    return found


def main() -> None:
    if sys.argv[1] == "--run":
        sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
        sys.stdout.write(json.dumps(digests(RUNS[sys.argv[2]](Path(sys.argv[3])))) + "\n")
        return
    other, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(RUNS)
    with tempfile.TemporaryDirectory() as work:
        here, there = (of_checkout(root, names, Path(work)) for root in (HERE, other))
    for name in names:
        verdict = "same" if here[name] == there[name] else "DIFFERENT"
        sys.stdout.write(f"{name}\t{verdict}\t{here[name]}\t{there[name]}\n")
    sys.exit(here != there)


if __name__ == "__main__":
    main()
