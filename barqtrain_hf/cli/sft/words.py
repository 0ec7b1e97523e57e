"""Messages of trainers and data sets, in the words of the command line."""

from __future__ import annotations

import json
import re
from ast import literal_eval

from barqtrain_hf.cli.sft.arguments import option_names

# What is called otherwise where the message is from.
_ALIASES = {"text_column": "dataset_text_field"}
_VALUE = r"""\{[^{}]*\}|\[[^\[\]]*\]|'[^']*'|"[^"]*"|\w[\w.+-]*\w|\w"""


def as_options(message: str) -> str:
    """The message with ``--max_length 512`` for ``max_length=512``, and ``--max_length`` for the bare name.

    Names of one word are left alone unless a value follows: they may be just that.
    """
    names = {name: name for name in option_names()} | _ALIASES
    known = "|".join(sorted(names, key=len, reverse=True))

    def option(match: re.Match[str]) -> str:
        name, equals, value = match["name"], match["equals"], match["value"]
        if not equals:
            return f"--{names[name]}" if "_" in name else name
        return f"--{names[name]}" + (f" {_spelled(value)}" if value else "")

    # Not what is an option already, a part of a path or of a name, or in quotes.
    before, after = r"""(?<![-\w./'"])""", r"""(?![\w/'"]|\.\w|-\w)"""
    pattern = rf"{before}(?P<name>{known})(?:(?P<equals>=)(?P<value>{_VALUE})?|{after})"
    return re.sub(pattern, option, message)


def _spelled(value: str) -> str:
    """A value of Python, as a shell takes it."""
    try:
        found = literal_eval(value)
    except (SyntaxError, ValueError):
        return value
    if isinstance(found, (dict, list)):
        return f"'{json.dumps(found)}'"
    return json.dumps(found) if isinstance(found, bool) else value
