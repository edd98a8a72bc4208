"""What `dora-vl` can do: one line for each verb, written by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One verb of `dora-vl`.

    Its module is imported when the verb is used. It holds `DESCRIPTION` (what --help says),
    `add_arguments(parser)` and `run(arguments)`, which yields the lines to print as they are ready; `TAKES_SETTINGS`
    where a run's own settings may follow, which `run` finds as `arguments.settings`; `SETS_UP_LOGGING` where it does.
    """

    module: str
    summary: str


COMMANDS = {
    "analyze": Command("dora_vl.evaluation.analyze_command", "what training changed: magnitudes and directions"),
    "ask": Command("dora_vl.evaluation.ask_command", "a model's answers about pictures or videos of your own"),
    "check-data": Command("dora_vl.sources.check_command", "what is wrong with data files, before a run finds it"),
    "completion": Command("dora_vl.completion_command", "a script with which a shell completes all of this"),
    "convert": Command("dora_vl.adapters.convert_command", "adapters of other tools, in and out"),
    "demo": Command("dora_vl.app.demo_command", "a web page: adapters and their base answer side by side"),
    "doctor": Command("dora_vl.setup.doctor_command", "what this machine has for a run, and what is missing"),
    "estimate": Command("dora_vl.pipelines.estimate_command", "memory, traffic and time of a run, before it starts"),
    "evaluate": Command(
        "dora_vl.evaluation.evaluate_command", "official scores with intervals, of adapters and predictions"
    ),
    "export": Command("dora_vl.evaluation.export_command", "a trained model for vLLM, or as GGUF; checks it"),
    "init": Command("dora_vl.setup.init_command", "your pictures and questions to the files of a first run"),
    "merge": Command("dora_vl.evaluation.merge_command", "base + adapters as a plain model folder; checks it"),
    "prepare": Command("dora_vl.sources.prepare_command", "a publisher's files to records"),
    "report": Command("dora_vl.report.report_command", "a run, or several side by side, as one page"),
    "serve": Command("dora_vl.app.serve_command", "a base and adapters, unmerged in one batch, for OpenAI's clients"),
    "show": Command("dora_vl.pipelines.show_command", "the first batch of a run, its tokens by label"),
    "train": Command("dora_vl.pipelines.train_command", "a run, from its settings to a tested adapter"),
    "translate": Command("dora_vl.translation.command", "other tools' settings as a run's YAML"),
}
