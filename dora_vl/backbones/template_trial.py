"""Tries a model's chat template, a program from elsewhere, in a process that can be ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from itertools import product
from typing import Any

from jinja2 import TemplateSyntaxError, meta
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dora_vl.errors import UserError
from dora_vl.limited_process import ENDED, Budget, JobFailed, LimitedProcess, Part

SECONDS, MEMORY = 2, 1 << 30
"""A chat template's trial rendering may take these CPU seconds and bytes; a usual one takes a fiftieth of the time."""


class _Generation(Extension):
    """Accepts `{% generation %}`, by which templates mark answers; it leaves the text unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Makes what reads a chat template as transformers does."""
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)


def variables_of(template: str, name: str) -> frozenset[str]:
    """Returns the names that the chat template of a model takes from outside."""
    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(template)))
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template of {name} cannot be read, line {error.lineno}: {error.message}; repair its "
            "chat_template.jinja (or tokenizer_config.json), or take another base"
        ) from error


_SIDE = {"type": "object", "properties": {"side": {"type": "string"}}, "required": ["side"]}
TOOL = {"type": "function", "function": {"name": "measure_edge", "description": "Measures.", "parameters": _SIDE}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "measure_edge", "arguments": {"side": "left"}}}
"""Templates are tried with this tool and its call."""


def try_template(content: bytes, templates: list[str], tokens: Mapping[str, Any]) -> Iterator[Part]:
    """Renders the templates, as a job of `limited_process`."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = _environment()
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    compiled = cache(environment.from_string)  # which takes long templates longer than to be rendered
    picture, words = {"type": "image"}, {"type": "text", "text": "Which colour is it?"}
    forms = (words["text"], [words], [picture, words])
    roles = ("system", "user", "assistant", "user", "assistant")
    conversations = (roles, roles[:2], roles[1:], roles[1:2], roles[1:3], (*roles[:3], "tool", "assistant"))
    for template, conversation, form, prompt in product(templates, conversations, forms, (False, True)):
        tools = [TOOL] if "tool" in conversation else None
        calls = {"assistant": {"tool_calls": [CALL]}} if tools else {}
        messages = [{"role": role, "content": form, **calls.get(role, {})} for role in conversation]
        values = {"messages": messages, "add_generation_prompt": prompt, "tools": tools, "documents": None, **tokens}
        try:
            compiled(template).render(values)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it has ended
            continue
    yield {}, b""


def check_ends(template: str | Mapping[str, str], tokens: Mapping[str, Any], name: str) -> None:
    """Refuses a model's chat templates if one of them does not end, or fills the memory.

    They are programs from elsewhere, so each is rendered as transformers does it in a process that can be ended. Other
    errors are left to whoever renders the template again.
    """
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
        except JobFailed as error:
            return str(error) if error.kind == ENDED else None
    return None
