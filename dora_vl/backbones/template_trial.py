"""Whether a chat template comes to an end: it is a program from elsewhere, and is tried where it can be ended.

It is rendered as transformers renders it, in Jinja's sandbox, for talks in every form that templates ask for. What it
raises is for whoever renders it again; time and memory alone are judged here. Torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from itertools import product
from typing import Any

from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dora_vl.errors import UserError
from dora_vl.limited_process import ENDED, Budget, Failed, LimitedProcess, Part

SECONDS, MEMORY = 2, 1 << 30
"""CPU seconds and bytes allowed for a trial rendering of a chat template; a usual one takes a fiftieth of the time."""
TALK = ("system", "user", "assistant", "user", "assistant")


class _Generation(Extension):
    """Accepts `{% generation %}`, by which templates mark answers; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def try_template(content: bytes, templates: list[str], tokens: Mapping[str, Any]) -> Iterator[Part]:
    """Renders the templates, as a job of `limited_process`."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    picture, words = {"type": "image"}, {"type": "text", "text": "Which colour is it?"}
    forms = (words["text"], [words], [picture, words])
    talks = (TALK, TALK[:2], TALK[1:], TALK[1:2], TALK[1:3])
    for template, talk, form, prompt in product(templates, talks, forms, (False, True)):
        messages = [{"role": role, "content": form} for role in talk]
        values = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None, **tokens}
        try:
            environment.from_string(template).render(values)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it has ended
            continue
    yield {}, b""


def check_ends(template: str | Mapping[str, str], tokens: Mapping[str, Any], name: str) -> None:
    """Refuses a model's chat templates if one of them does not end, or fills the memory."""
    templates = [template] if isinstance(template, str) else [*template.values()]
    texts = {key: str(token) for key, token in tokens.items() if not isinstance(token, list)}
    if reason := _why_not(json.dumps({"templates": templates, "tokens": texts})):
        raise UserError(
            f"the chat template of {name} does not end within {SECONDS} s, or takes more than {MEMORY >> 30} GiB "
            f"({reason}); repair its chat_template.jinja (or tokenizer_config.json), or take another base"
        )


@cache
def _why_not(arguments: str) -> str | None:
    with LimitedProcess("try_template") as process:
        try:
            list(process.run("try_template", json.loads(arguments), budget=Budget(SECONDS, MEMORY)))
        except Failed as error:
            return str(error) if error.kind == ENDED else None
    return None
