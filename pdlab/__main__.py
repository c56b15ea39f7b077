"""The entry point: `pdlab`, and `python -m pdlab`. Ctrl-C ends it with 130 and without a traceback from the first import on."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """`pdlab.cli.main`, whose imports take a moment in which there is nothing to keep."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the shell has it ignored
    if usual:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from pdlab.cli.main import main as run

    try:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
