"""The wheel in an environment with nothing but what it declares, from an empty folder: what a person does first.

    python tests/fresh_install.py --to runs/fresh-install
    python tests/fresh_install.py --is-needed          status 0 where declarations or imports have changed

The demo in little (`dora-vl quickstart`), the commands of docs/your_pictures.md on what it left, a merge, a report, and
one step of the published 7B recipe on a stand-in of Vicuna with `tokenizer.model` alone. Imports the standard library.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LITTLE = (
    "--training.max_steps 2 --training.save_steps 2 --training.eval_strategy no"
    " --training.load_best_model_at_end false --evaluation.limit 4 --data.replay 0"
)
BASE_IN_LITTLE = (
    f"{LITTLE} --evaluation.file null --data.validation null --data.validation_limit null --data.cache_features false"
)
RECIPE_IN_LITTLE = (
    "llava/llava15 --variant 7b_dora --model.base base --model.compose.vision_name clip "
    "--model.compose.language_model vicuna --data.train data/mix.json --data.image_folder data --data.workers 0 "
    "--training.tf32 false --training.per_device_train_batch_size 4 --training.gradient_accumulation_steps 1 "
    "--training.max_steps 1 --training.output_dir run --adapter.initial null"
)
EXTRAS = "deepspeed,sentencepiece"
"""What the published recipe needs beside, as docs/recipes.md says."""
ADAPTER = "adapter/adapter_model.safetensors"
IMPORT = re.compile(r"^[+-]\s*(?:from (\w+)[\w.]* import|import (\w+)|.*\b(?:import_module|find_spec)\(\"(\w+))")


def is_needed(root: Path = ROOT) -> bool:
    """Whether what is declared or imported differs from main, or the commit before; where git cannot tell, it does."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    since = git("merge-base", "origin/main", "HEAD~1") or git("rev-parse", "--verify", "HEAD~1")
    changes = git("diff", "--unified=0", since, "--", "dora_vl") if since else None
    if since is None or changes is None or git("diff", "--quiet", since, "--", "pyproject.toml") is None:
        return True
    names = {name for line in changes.splitlines() if (match := IMPORT.match(line)) for name in match.groups() if name}
    return bool(names - sys.stdlib_module_names - {"dora_vl"})


def megabytes(path: Path) -> int:
    """What a file, or a folder's files, take."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir()) >> 20


class Person:
    """Types commands in one folder, in which nothing of a checkout can be found."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.programs, self.folder = environment / "bin", folder
        folder.mkdir(parents=True)
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.variables |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "VIRTUAL_ENV": str(environment)}
        self.variables["PATH"] = f"{self.programs}{os.pathsep}{os.environ['PATH']}"

    def types(self, *words: str | Path, **variables: str) -> str:
        """What the command prints; ends this program with its last lines where it fails."""
        command, started = [str(word) for word in words], time.monotonic()
        program = [str(self.programs / command[0]), *command[1:]]
        environment = {**self.variables, **variables}
        done = subprocess.run(program, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        say(f"{time.monotonic() - started:6.1f} s  {shlex.join(command).splitlines()[0][:100]}")
        if done.returncode:
            sys.exit(f"status {done.returncode} of {shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def has(self, *names: str) -> None:
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            sys.exit(f"{self.folder} lacks {', '.join(missing)}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def installed(to: Path) -> Path:
    """A new environment with the wheel and what it declares, no extra; prints their sizes."""
    environment, folder = to / "venv", to / "wheel"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip: Sequence[str | Path] = [environment / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-compile", wheel], check=True)
    say(f"{wheel.name}: {wheel.stat().st_size >> 10} kB; with all that it declares {megabytes(environment)} MB")
    return environment


def own_pictures(person: Person) -> None:
    """docs/your_pictures.md as it stands, in two steps of training, then a merge and a report."""
    page = (ROOT / "docs" / "your_pictures.md").read_text(encoding="utf-8")
    drawn, commands = (
        re.findall(rf"<!-- {mark} -->\n```\w*\n(.*?)```", page, re.DOTALL)[0] for mark in ("drawn", "commands")
    )
    person.types("python", "-c", drawn)
    for line in commands.splitlines():
        words = shlex.split(line)
        printed = person.types(*words, *(LITTLE.split() if words[1] == "train" else ()))
    if "with adapter:" not in printed:
        sys.exit(f"no answer: {printed}")
    person.types("dora-vl", "merge", "--adapter", "runs/my/adapter", "--to", "merged")
    person.types("dora-vl", "report", "runs/my")
    person.has(f"runs/my/{ADAPTER}", "merged/model.safetensors", "runs/my/report.html")


def main() -> None:
    """Installs, types, prints minutes and megabytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "runs" / "fresh-install", help="a new folder")
    parser.add_argument("--is-needed", action="store_true", help="says by its status whether it is worth the minutes")
    options = parser.parse_args()
    if options.is_needed:
        sys.exit(0 if is_needed() else 1)
    started, to = time.monotonic(), options.to.resolve()
    environment = installed(to)
    say(f"{time.monotonic() - started:6.1f} s  installed")
    person = Person(environment, to / "person")
    person.types("dora-vl", "doctor")
    person.types("dora-vl", "quickstart", *BASE_IN_LITTLE.split())
    person.has(f"runs/demo/{ADAPTER}", "runs/demo/tuned/model.safetensors")
    own_pictures(person)
    published = Person(environment, to / "published")
    (wheel,) = (to / "wheel").glob("*.whl")
    published.types("python", "-m", "pip", "install", "--quiet", "--no-compile", f"{wheel}[{EXTRAS}]")
    published.types("python", ROOT / "tests" / "training" / "published_recipe.py", ".", PYTHONPATH=str(ROOT))
    published.types("dora-vl", "train", *RECIPE_IN_LITTLE.split())
    published.has(f"run/{ADAPTER}")
    minutes, computing = (time.monotonic() - started) / 60, sum(os.times()[2:4]) / 60
    say(f"{minutes:.1f} minutes ({computing:.1f} of CPU), {megabytes(to)} MB with the demo's packages and runs")


if __name__ == "__main__":
    main()
