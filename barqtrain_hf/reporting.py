"""How a callback comes before the loggers that `report_to` names."""

from __future__ import annotations

import inspect

from transformers import DefaultFlowCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler


def handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """Who has called an event of ``callback``, or None where no Trainer did.

    Trainer calls the loggers first and passes no callback a way to the others, so what it would add to the
    logs comes too late. The caller is found on the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and callback in caller.callbacks:
            return caller
        frame = frame.f_back
    return None


def go_before_loggers(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Puts ``callback`` behind the one that decides when to log, which is the first.

    It may be called while the handler calls its callbacks: none is called twice or left out.
    """
    callbacks = handler.callbacks
    flow = [n for n, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
    place = flow[-1] + 1 if flow else 0
    if callbacks.index(callback) > place:
        callbacks.remove(callback)
        callbacks.insert(place, callback)


def loggers(handler: CallbackHandler | None) -> dict[str, TrainerCallback]:
    """The loggers that are on, by their names in `report_to`."""
    found = {}
    for callback in [] if handler is None else handler.callbacks:
        for name, kind in INTEGRATION_TO_CALLBACK.items():
            if isinstance(callback, kind):
                found[name] = callback
    return found
