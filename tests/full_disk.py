"""A disk that has no room for more."""

import io
import resource
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def no_file_above(size):
    """The system's own refusal, met in the middle of a file by whatever library writes it.

    What is printed goes elsewhere: pytest's file of it may be longer than that already.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
