"""``barqtrain sft``: supervised fine-tuning as ``trl sft`` does it, with the same options, by BarqSFTTrainer.

The parts, in the order in which a run meets them: `arguments` and `help`; `launch` starts several processes;
`checks` names mistakes before anything is loaded; `data` loads the data sets; `run` trains and saves, and
`summary` says what came of it. `words` puts options in the place of Python's arguments in what went wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from barqtrain_hf.errors import BarqError, UnsupportedError


def main(argv: Sequence[str]) -> int:
    """Parses the options and trains; returns the exit code."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"It needs TRL ({error}).", "pip install 'barqtrain_hf[sft]'"
        ) from None
    from barqtrain_hf.cli.sft import help as help_

    if "-h" in argv or "--help" in argv:
        print(help_.short())
        return 0
    if "--help_all" in argv:
        print(help_.whole())
        return 0
    from barqtrain_hf.cli.sft import launch
    from barqtrain_hf.cli.sft.arguments import parse
    from barqtrain_hf.cli.sft.words import as_options

    try:
        options, left = parse(argv)
        if launch.is_wanted(left, options.training.use_cpu):
            return launch.launch(argv, left)
        from barqtrain_hf.cli.sft.run import run

        return run(options)
    except BarqError as error:
        raise BarqError(as_options(str(error))) from None
