"""The options of commands whose work imports torch; reading them, and their --help, does not."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dora_vl.errors import number_between, positive_int

METHODS = ("dora", "lora", "magnitude", "dvora", "full")
RESULT_DTYPES = ("bfloat16", "float16", "float32")
QUESTIONS = 20
CONFIG_HELP = "YAML file with the run's settings, or a recipe's name"
CHECK_HELP = """\
With --check the unmerged model and what was written answer the same questions, those of the run's test or of a file;
answers and logits are compared, in check.json beside the weights. Exit status 1 where more answers differ than
--most-different allows."""


def analyze(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl analyze`."""
    parser.set_defaults(work="evaluation.analyze:analyze")
    parser.description = """\
Measures, for every layer and every checkpoint, the mean change of the weight's magnitudes (dM) and of its directions
(dD, 1 - cosine), fits dM over dD, and draws the models side by side: section 3 of the DoRA paper. There the query
weights of VL-BART had a slope below 0 with full fine-tuning and with DoRA, above 0 with LoRA.

  dora-vl analyze llava-base/ runs/full runs/lora runs/dora --to decomposition
  dora-vl analyze llama/ llama-tuned/ adapter/ --label "full tuning" --label DoRA --layers '*.q_proj'

A TUNED is a model folder in safetensors, an adapter folder (PEFT's or ours, any method), or a run: each of its
checkpoints is one point a layer. Weights are read one tensor at a time. Writes NAME.png and NAME.json.
"""
    add = parser.add_argument
    add("base", type=Path, metavar="BASE", help="the model folder that training started from")
    add("tuned", type=Path, nargs="+", metavar="TUNED", help="what came of it; one panel each")
    add("--label", action="append", metavar="TEXT", help="one for each TUNED; default: its path")
    add("--layers", action="append", default=[], metavar="GLOB", help="full names; default: what the adapters adapt")
    add("--axis", choices=("output", "input"), default="output", help="one vector for each output (default) or input")
    add("--to", type=Path, default=Path("decomposition"), metavar="NAME", help="of the files")
    add("--any-base", action="store_true", help="accept a base whose content hash differs")


def convert(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl convert`."""
    parser.set_defaults(work="adapters.foreign_formats:convert")
    parser.description = """\
Reads an adapter of another tool and writes an adapter folder (adapter_model.safetensors, adapter_config.json): what
PEFT, transformers and dora_vl load. The format is known by the file's keys; --from names it where they do not tell.

  dora-vl convert DoRA-llava/ --to adapter                      NVlabs' LLaVA, both of its .bin files
  dora-vl convert LAST.pth --to adapter                         NVlabs' VL-BART
"""
    add = parser.add_argument
    add("source", type=Path, metavar="FROM", help="a folder or file that holds an adapter")
    add("--to", type=Path, required=True, metavar="FOLDER", help="adapter folder to write, replaced if it is one")
    add("--base", type=Path, metavar="FOLDER", help="the base, written down as the adapter's")
    _add_reading(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds what some formats of adapters need."""
    add, formats = parser.add_argument, "peft, nvlabs, nvlabs-llava or nvlabs-vlbart"
    add("--from", dest="format", metavar="FORMAT", help=f"{formats}; default: known by the keys")
    add("--alpha", type=float, help="numerator of the scale, where no file states it")
    text = "beginnings of layer names, of other tools' files; may come often"
    add("--rename", action="append", default=[], metavar="OLD=NEW", help=text)


def export(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl export`."""
    parser.set_defaults(work="evaluation.merging:export")
    parser.description = f"""\
Writes a trained model as another server takes it.

  dora-vl export --for vllm --adapter runs/llava/adapter --to served

vLLM serves adapters of the language model's linear layers, and nothing else that was trained: the projector, and what
was adapted in the vision tower, are folded into served/base; served/adapter holds the rest and stays an adapter.

{CHECK_HELP}
"""
    parser.add_argument("--for", dest="server", choices=("vllm",), required=True, help="the server")
    _add_writing(parser)
    parser.add_argument("--dtype", choices=RESULT_DTYPES, help="of the base; default: each tensor's own")
    parser.set_defaults(base_values="trained")


def merge(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl merge`."""
    parser.set_defaults(work="evaluation.merging:merge")
    parser.description = f"""\
Writes base + adapter as a plain model folder: sharded safetensors, configuration, tokenizer and processor. Computed in
float32, one tensor in memory at a time, so a 7B model needs no second copy. An earlier merge in --to is replaced.

  dora-vl merge --adapter runs/llava/adapter --to llava-merged
  dora-vl merge --adapter adapter --base llava-1.5-7b/ --dtype float16 --to merged

{CHECK_HELP}
Without --check the logits for a few drawn texts are compared, and exit status 1 says that they differ by more than
rounding; --no-check compares nothing.

  dora-vl merge --adapter runs/llava/adapter --to llava-merged --check 50
  dora-vl merge --adapter adapter --to merged --check --questions test.jsonl --images pictures --most-different 0.02
"""
    _add_writing(parser)
    parser.add_argument("--dtype", choices=RESULT_DTYPES, help="of the result; default: as stored, or as trained")
    parser.add_argument(
        "--base-values",
        choices=("trained", "stored"),
        default="trained",
        help="of a base that was quantised for training: trained (default) merges into the values after quantisation, "
        "so that the result is the trained model; stored into the folder's own, which the adapter never saw",
    )


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """Adds what combines an adapter with its base, and checks the result."""
    add = parser.add_argument
    add("--adapter", type=Path, required=True, metavar="DIR", help="folder of a run")
    add("--to", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--base", type=Path, metavar="FOLDER", help="default: what the adapter says it was trained on")
    add("--any-base", action="store_true", help="accept a base whose content hash differs")
    _add_reading(parser)
    add = parser.add_argument_group("checking the result").add_argument
    add("--no-check", dest="check", action="store_const", const=0, help="merge: compares nothing")
    help_text = f"asks N questions (default {QUESTIONS})"
    add("--check", type=positive_int, nargs="?", const=QUESTIONS, metavar="N", help=help_text)
    add("--questions", type=Path, metavar="FILE", help="in any format that training reads (default: the run's test)")
    add("--images", type=Path, metavar="DIR", help="root of their pictures (default: the run's, or here)")
    add("--template", help="prompt format of a LLaVA-1.5 or a language model without recipe.json")
    text = "that the models compute in (default: float32; the run's own where its base was quantised)"
    add("--check-dtype", choices=RESULT_DTYPES, help=text)
    add("--check-tokens", type=positive_int, default=32, metavar="N", help="longest answer")
    share, text = number_between(float, 0, 1), "of the questions whose answers may differ, 0 to 1 (default: 0)"
    add("--most-different", type=share, default=0.0, metavar="SHARE", help=text)


def estimate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl estimate`; a run's own settings may come between them."""
    parser.set_defaults(work="training.estimate:estimate", takes_settings=True)
    parser.description = """\
Says what a run will take of each GPU: bytes by part, bytes that an optimizer step sends, and its time from a share of
the GPUs' peak and the links' speed. The model is made from only its config, on torch's meta device: no weight is read.

  dora-vl estimate llava/llava15 --variant 7b_dora --shape llava-1.5-7b --gpus 8
  dora-vl estimate my_run.yaml --gpus 64 --machines 8 --mfu 0.4 --training.deepspeed zero2
  dora-vl estimate my_run.yaml               on this machine: its speed is measured, the first batch is counted

What this command does not know is a setting of the run, --section.key value, as for the script itself. docs/starting.md
says what is left out.
"""
    add = parser.add_argument
    amount, share = number_between(float, 1e-9, 1e9), number_between(float, 1e-9, 1)
    add("config", metavar="CONFIG", help=CONFIG_HELP)
    add("--gpus", type=positive_int, metavar="N", help="GPUs in all (default: one device of this machine)")
    add("--machines", type=positive_int, metavar="M", help="that hold them (default: 8 GPUs in each)")
    add("--shape", metavar="NAME", help="a published model's sizes, in place of model.base")
    add("--tokens", type=positive_int, metavar="T", help="of a sample (default: data.max_tokens)")
    add("--labelled", type=positive_int, metavar="T", help="of these (default: all but the picture's)")
    add("--mfu", type=share, default=0.4, metavar="F", help="share of the peak (default: 0.4)")
    add("--tflops", type=amount, default=312.0, help="a GPU's peak (default: 312, an A100's)")
    add("--bandwidth", type=amount, default=230.0, metavar="GB/s", help="between GPUs (default: 230)")
    add("--network", type=amount, default=100.0, metavar="GB/s", help="of a machine (default: 100)")
    add("--json", type=Path, metavar="FILE", help="also writes the numbers to this file")


def show(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl show`; a run's own settings may come between them."""
    parser.set_defaults(work="training.show:show", takes_settings=True)
    parser.description = """\
Shows the first micro-batch that training would see: every token, whether it is trained on, read only, the place of a
picture, or padding. The base's weights are not read (a base that a recipe composes is composed first, once).

  dora-vl show batch llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures

CONFIG is a file or a recipe's name; after it any setting of the run, --section.key value.
"""
    parser.add_argument("what", choices=("batch",), help="what to show")
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)


def compare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl compare`; a run's own settings may come between them, for all runs."""
    parser.set_defaults(work="report.compare:compare", takes_settings=True)
    parser.description = """\
Trains one recipe by several methods and ranks at equal budgets, and says how they differ. The learning rate of each
method and rank is chosen by the validation loss of the checkpoint that is tested: of three around the recipe's, or of
more beyond them while the last one is best (seven at most). Only then the test is asked, once for each seed.

  dora-vl compare commonsense/smollm2_135m_cloze --methods dora,lora,full --ranks 1,4,16 --to runs/compared
  dora-vl compare runs/my/run.yaml --methods dora,lora --ranks 8 --rates 1e-4,3e-4,1e-3 --seeds 5 --to runs/compared

A score is the test's own metric; several sets are averaged where they have the same one. Differences of methods, of
neighbouring ranks and to the untrained model are paired over the test's items; 95 % intervals are over items and seeds
together, from three seeds on, and a star marks a difference that holds with all of the table's taken together.

The recipe needs data.validation (or data.validation_share) and a test. A recipe's `alpha / rank` is kept for every
rank. Started again, also by several processes or on several machines at a time, it resumes: each run is a folder of its
own in --to. A run whose training diverged has no result for good; one that ended for another reason is run again.
Writes compare.json, score_by_rank.png and loss_by_rate.png there.
"""
    add, numbers = parser.add_argument, _separated(float)
    add("config", metavar="CONFIG", help=CONFIG_HELP)
    add("--methods", type=_methods, default="dora,lora", help=f"of {', '.join(METHODS)} (default: dora,lora)")
    add("--ranks", type=_separated(int), default=[], help="with commas (default: the recipe's)")
    sweep = "learning rates, or sweep: from the recipe's (default)"
    add("--rates", type=lambda text: None if text == "sweep" else numbers(text), help=sweep)
    add("--seeds", type=positive_int, default=3, help="runs at the chosen rate (default: 3)")
    add("--to", type=Path, required=True, metavar="FOLDER", help="of all runs and of the result")
    strengths = "tests the first contender's adapter at these strengths too"
    add("--strengths", type=numbers, default=[], help=strengths)
    add("--untrained", action="store_true", help="asks the model before training too")


def _methods(text: str) -> list[str]:
    methods = [*dict.fromkeys(method.strip() for method in text.split(","))]
    if strange := [method for method in methods if method not in METHODS]:
        raise argparse.ArgumentTypeError(f"no method {strange[0]!r}; there are {', '.join(METHODS)}")
    return methods


def _separated(kind: type[int] | type[float]) -> Callable[[str], list[float]]:
    """Returns a type of option: numbers above 0 with commas between, each once."""

    def numbers(text: str) -> list[float]:
        try:
            values: list[float] = [kind(part) for part in text.split(",") if part.strip()]
        except ValueError:
            values = []
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}: write numbers above 0 with commas between")
        return [*dict.fromkeys(values)]

    return numbers


def push(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl push`."""
    parser.set_defaults(work="report.push:push")
    parser.description = """\
Puts a run's adapter on the Hugging Face hub, with a model card made of the run: how it was trained, scores with 95 %
intervals beside what a model that does not look would score, what it forgot, and the contact sheet. Log in before, with
`hf auth login`, or set HF_TOKEN.

  dora-vl push runs/my OWNER/NAME --dry-run       writes runs/my/hub, to be looked at, and ends
  dora-vl push runs/my OWNER/NAME                 uploads it to a private repository, which is made if it is not there
  dora-vl push runs/my OWNER/NAME --public --license apache-2.0
"""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder, its training.output_dir")
    add("repository", metavar="OWNER/NAME", help="where it goes on the hub")
    add("--dry-run", action="store_true", help="writes the folder that would be uploaded, and ends")
    add("--public", action="store_true", help="makes a new repository public; default: private")
    add("--license", metavar="ID", help="the hub's name of the adapter's licence, such as apache-2.0")
    add("--no-pictures", action="store_true", help="leaves out the contact sheet, the test's pictures")


def report(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl report`."""
    parser.set_defaults(work="report.report:report")
    parser.description = """\
Makes one HTML file of a run, or of several side by side: scores with 95 % intervals and paired differences, curves,
the watched questions through training, wrong and right answers with their pictures, confusion of closed answers,
what trained, settings and versions. It opens without a network.

  dora-vl report runs/demo
  dora-vl report runs/lora runs/dora --to comparison.html

A part that a run holds nothing for says so. The first run is the one that others are compared with. What training
changed in the weights is drawn by dora-vl analyze.
"""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, its training.output_dir")
    where = "default: report.html in the run's folder, of several beside the first"
    parser.add_argument("--to", type=Path, metavar="FILE.html", help=where)
    parser.add_argument("--label", action="append", metavar="TEXT", help="one for each RUN; default: its folder's name")
