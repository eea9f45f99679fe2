"""The `moebert` command from its first instant: outside the package, whose import takes seconds."""

import os
import signal


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # Ctrl-C while all is being imported
    from moebert_kernels.cli import main

    main()


if __name__ == "__main__":
    main()
