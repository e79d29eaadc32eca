"""Starts SGLang as `python -m sglang.launch_server` does, with its key from the environment.

Standard library only: it runs in SGLang's environment, which need not have this package. SGLang
takes a key on its command line only, where every user of the machine reads it; here it is added
inside of the process. SGLang logs its arguments: the key is left out there.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from typing import Any

VARIABLE = "LIGHTNING_GRPO_API_KEY"


def hide_in_logs(key: str) -> None:
    """Put stars in the place of the key in whatever is logged."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        text = made.getMessage()
        if key in text:
            made.msg, made.args = text.replace(key, "***"), ()
        return made

    logging.setLogRecordFactory(record)


def main() -> None:
    """Become the server."""
    # A script's folder comes first on the path; this one's modules would hide others.
    sys.path[0] = ""
    key = os.environ.get(VARIABLE)
    if key:
        hide_in_logs(key)
        sys.argv += [f"--api-key={key}"]  # one word: a key may begin with a dash
    # With `alter_sys` its spawned children find the same main module as after `-m`.
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
