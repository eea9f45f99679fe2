"""The `moebert` command from its first instant: outside the package, so that Ctrl-C is quiet at once."""

import os
import signal


def main() -> None:
    """Run the command line of this process."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in the background of a shell
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from moebert_kernels.cli import main

    main()


if __name__ == "__main__":
    main()
