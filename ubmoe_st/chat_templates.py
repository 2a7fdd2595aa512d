"""Chat templates as text: the sandbox in which they run, and which variables they read."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import meta
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class AnswerMarks(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks answers for training and prints nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> Any:
        """Take the statements between the marks as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates find in transformers."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, *form: Any, **named: Any) -> str:
        names = ("indent", "separators", "sort_keys")  # in the order in which templates may give them
        return json.dumps(value, ensure_ascii=ensure_ascii, **dict(zip(names, form)), **named)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", AnswerMarks]
    )
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    made.filters["tojson"] = as_json
    return made


@lru_cache(maxsize=16)
def names_read(template: str) -> frozenset[str]:
    """Variables that a chat template reads.

    Raises:
        TemplateError: If it is no template.
    """
    return frozenset(meta.find_undeclared_variables(environment().parse(template)))
