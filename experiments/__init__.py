"""One module for each experiment; `python -m experiments.NAME` runs it."""

import os
import signal
import sys


def end_at_once(*_) -> None:
    os.write(2, b"SIGINT: ended at once\n")
    os._exit(130)


# Ctrl-C during a command's imports prints one line instead of a traceback from within them.
# `cli.exit_status` restores the usual handler; Python calls the command "-m" while it looks for it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
