"""`dora-vl push`: a run's adapter on the Hugging Face hub, with a model card made of what the run left."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from dora_vl.adapters.files import FILES
from dora_vl.errors import UserError, one_line
from dora_vl.evaluation.forgetting import forgetting_lines
from dora_vl.files import METRICS, whole_folder
from dora_vl.report.run_record import RunRecord, blind, read_record, read_tests, score_rows
from dora_vl.report.views import setting_tables
from dora_vl.run.folder import ADAPTER

HUB, CARD, CONTACT_SHEET = "hub", "README.md", "contact_sheet.png"
TASKS = {"llava": "image-text-to-text", "image_text": "image-text-to-text", "commonsense": "text-generation"}
"""Maps a run's task to the hub's name of it."""


def push(arguments: argparse.Namespace) -> Iterator[str]:
    """Writes the folder and uploads it; yields the lines to print."""
    repository = arguments.repository
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: {error}") from error
    record = read_record(arguments.run, repository.rpartition("/")[2])
    folder = write_folder(record, repository, licence=arguments.license, pictures=not arguments.no_pictures)
    yield from (f"{path}  {path.stat().st_size:,} bytes" for path in sorted(folder.iterdir()))
    base = str(record.section("model").get("base"))
    if Path(base).exists():
        yield f"its base is a folder here, {base}, which others need as well; `dora-vl merge` makes one of both"
    if arguments.dry_run:
        yield f"nothing was uploaded; look at {folder / CARD}"
        return
    hub = HfApi(library_name="dora_vl")
    try:
        hub.create_repo(repository, private=not arguments.public, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Adapter and model card")
    except LocalTokenNotFoundError as error:
        raise UserError("the hub does not know you: hf auth login, or set HF_TOKEN") from error
    except (HTTPError, OSError) as error:
        raise UserError(one_line(f"{repository} was not uploaded: {error}")) from error
    yield f"{commit.commit_url}"


def write_folder(run: RunRecord, repository: str, *, licence: str | None, pictures: bool) -> Path:
    """Writes what is uploaded into the run's folder `hub`: the adapter, its scores, the card and the contact sheet."""
    adapter = run.folder / ADAPTER
    if not adapter.is_dir():
        raise UserError(f"{run.folder}: it has no adapter yet; train to the end first")
    sheet = [run.folder / CONTACT_SHEET] if pictures else []
    with whole_folder(run.folder / HUB) as staging:
        for source in filter(Path.is_file, [*(adapter / name for name in FILES), run.folder / METRICS, *sheet]):
            shutil.copyfile(source, staging / source.name)
        card = model_card(run, repository, licence=licence, sheet=(staging / CONTACT_SHEET).is_file())
        (staging / CARD).write_text(card, encoding="utf-8")
    return run.folder / HUB


def model_card(run: RunRecord, repository: str, *, licence: str | None, sheet: bool) -> str:
    """Returns the README of the repository, with the hub's own block of facts in front."""
    tests, missing = read_tests(run)
    results = {**tests, **run.benchmarks}
    base, task = str(run.section("model").get("base")), TASKS.get(str(run.settings.get("task")))
    headlines = [
        EvalResult(
            task_type=task or "other",
            dataset_type=name,
            dataset_name=name,
            metric_type=str(result.entry["headline"]),
            metric_value=result.scored.metrics[result.entry["headline"]],
        )
        for name, result in results.items()
        if result.scored is not None
    ]
    facts = ModelCardData(
        model_name=repository.rpartition("/")[2],
        base_model=None if Path(base).exists() else base,
        eval_results=headlines or None,
        library_name="peft",
        license=licence,
        pipeline_tag=task,
        tags=["dora_vl", str(run.section("adapter").get("method"))],
    )
    values: dict[str, Any] = {
        "run": run,
        "repository": repository,
        "base": without_folder(base),
        "sheet": CONTACT_SHEET if sheet else None,
        "rows": score_rows([results])[0],
        "warnings": [*missing, *blind(run.label, results)],
        "forgotten": forgetting_lines(run.metrics.get("forgetting")),
        "settings": {name: without_folder(row[0]) for name, row in setting_tables([run])["first"].items()},
        "versions": run.plan.get("versions") or run.recipe.get("versions") or {},
    }
    template = (Path(__file__).parent / "templates" / "model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = cell
    return str(ModelCard(environment.from_string(template).render(card_data=facts.to_yaml(), **values)))


def without_folder(value: str) -> str:
    """Returns a setting's text for others to read: of a path on this machine, also in a list, only the name."""
    return Path(value).name if Path(value).is_absolute() else re.sub(r'"/(?:[^"]*/)?', '"', value)


def cell(text: str) -> str:
    """Returns foreign text as it is written in one cell of a table: on one line, without HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
