"""The command ``foveal``."""

from __future__ import annotations

import signal
import sys

from foveal import _native


def main() -> None:
    # The command has handlers of its own; Python's would wait for the interpreter, which waits for the command.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.exit(_native.command(["foveal", *sys.argv[1:]]))
