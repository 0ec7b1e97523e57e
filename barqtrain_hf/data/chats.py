"""Chats as text, and what of it the assistant says."""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from barqtrain_hf.data.tokenizer import Span
from barqtrain_hf.errors import ArgumentError, UnsupportedError

logger = logging.getLogger(__name__)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": role, "content": "dummy"} for role in ("user", "assistant", "user")]
_numbers = itertools.count()
_warned_of: set[str] = set()


class ChatTemplate:
    """Renders chats by the chat template of a tokenizer.

    Args:
        tokenizer: the Hugging Face tokenizer.
        find_assistant: whether to find what is between ``{% generation %}`` and ``{% endgeneration %}``.
    """

    def __init__(self, tokenizer: Any, find_assistant: bool) -> None:
        self._tokenizer = tokenizer
        self._find = find_assistant
        self._checked = False
        self._lock = threading.Lock()
        # transformers keeps what it found in the compiled template, one for all threads. A comment that
        # renders as nothing makes a template of ours, which nobody else renders at the same time.
        self._ours = f"{{# barqtrain_hf {next(_numbers)} #}}\n"

    def render(
        self, row: Mapping[str, Any], messages: Any, add_generation_prompt: bool = False
    ) -> str:
        """The chat with the ``tools`` and ``chat_template_kwargs`` of its row.

        Raises:
            ArgumentError: the tokenizer has no chat template.
        """
        arguments = self._arguments(row)
        if self._find:
            arguments["chat_template"] = self._template(arguments)
        with self._lock:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )

    def render_and_find(
        self, row: Mapping[str, Any], messages: Any
    ) -> tuple[str, list[Span] | None]:
        """The chat as `render` has it, and the characters the assistant says; None if not to be found.

        Raises:
            ArgumentError: the tokenizer has no chat template, or one without ``{% generation %}``.
            UnsupportedError: transformers renders chats in a way that is not known here.
        """
        if not self._find:
            return self.render(row, messages), None
        text, spans = self._tracked(row, messages)
        if not self._checked:
            self._checked = True
            if text != self.render(row, messages):
                raise UnsupportedError(
                    "The tokenizer renders a chat in another way than transformers' render_jinja_template, "
                    "so what the assistant says in it is not known.",
                    "Tokenise with trl.SFTTrainer or datasets.map, and pass the input_ids and labels.",
                )
            self._warn_of_endless_turns(row)
        return text, spans

    def _arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ArgumentError(
                "dataset holds chats, and the tokenizer has no chat_template: set one, or pass text."
            )
        tools = row.get("tools")
        return {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        }

    def _template(self, arguments: Mapping[str, Any]) -> str:
        template = self._tokenizer.get_chat_template(
            arguments.get("chat_template"), arguments["tools"]
        )
        if not _GENERATION.search(template):
            raise ArgumentError(
                "assistant_only_loss is True, and the chat template has no {% generation %} ... "
                "{% endgeneration %} around what the assistant says: add them, or set "
                "tokenizer.chat_template to trl.chat_template_utils.get_training_chat_template(tokenizer), "
                "which has them for many models."
            )
        return self._ours + template

    def _tracked(self, row: Mapping[str, Any], messages: Any) -> tuple[str, list[Span]]:
        # What apply_chat_template does, which gives no characters but tokens, made one chat at a time.
        from transformers.utils.chat_template_utils import render_jinja_template

        arguments = self._arguments(row)
        arguments["chat_template"] = self._template(arguments)
        chat = [
            {key: message[key] for key in message if message[key] is not None}
            for message in messages
        ]
        with self._lock:
            (text,), (spans,) = render_jinja_template(
                conversations=[chat],
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **arguments},
            )
        return text, spans

    def _warn_of_endless_turns(self, row: Mapping[str, Any]) -> None:
        """Warns of a template by which the model does not learn to end its turn."""
        from jinja2.exceptions import TemplateError

        try:
            text, spans = self._tracked(row, _PROBE)
        except TemplateError:
            return  # it takes no such chat, so nothing is known
        said = "".join(text[begin:end] for begin, end in spans).rstrip()
        if not said.endswith(tuple(self._tokenizer.get_added_vocab())) and said not in _warned_of:
            _warned_of.add(said)  # data may be read several times
            logger.warning(
                "assistant_only_loss is True, and the chat template ends what the assistant says, %r, before "
                "the token that ends its turn: the model may not learn to stop. Move {%% endgeneration %%} "
                "behind that token.",
                said,
            )
