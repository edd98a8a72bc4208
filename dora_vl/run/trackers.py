"""Whether what `training.report_to` names is there: asked before weights are read, not when the Trainer is made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from dora_vl.errors import UserError, shown

TRACKERS = {
    "azure_ml": ("azureml.core", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""transformers' name of a tracker -> the module that it imports, and the package that brings it."""
NO_TRACKER, EVERY_TRACKER = "none", "all"


def check_trackers(report_to: object) -> None:
    """Refuses a tracker that transformers does not know, or whose package is not installed.

    Args:
        report_to: a name or a list of names, as `transformers.TrainingArguments` takes it.

    Raises:
        UserError: it says how to install it.
    """
    wanted = [report_to] if isinstance(report_to, str) else report_to
    for name in wanted if isinstance(wanted, Sequence) else ():
        if name in (NO_TRACKER, EVERY_TRACKER):
            continue
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise UserError(
                f"training.report_to: there is no tracker {shown(name)}; there are {known} and {NO_TRACKER}"
            )
        module, package = TRACKERS[name]
        if not _is_installed(module):
            raise UserError(
                f"training.report_to: {name} is not installed; pip install {package}, or leave report_to out: "
                "log.jsonl in the run folder has every number"
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
