"""Wrong options in a sentence of ours; imports next to nothing, so that help is there at once."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class PlainGroup(TyperGroup):
    """Commands whose wrong options are told without pydantic's accent, and with the value found."""

    def invoke(self, ctx: Any) -> Any:
        """Run what was asked for; see `TyperGroup`."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _plain(error)
            raise


def _plain(error: typer.BadParameter) -> str:
    """The message, from which pydantic leaves out the value and in which it names the kind of exception."""
    # Older versions of typer find errors by themselves.
    list_errors = getattr(error.__cause__, "errors", None)
    message = error.message.removeprefix("Value error, ")
    if list_errors is None:
        return message
    found = list_errors()[0]
    got = f", got {found['input']}"
    # What typer's own checks raise tells the value.
    return message if found["type"] == "value_error" or message.endswith(got) else message + got
