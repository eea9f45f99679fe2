"""`python -m bench`."""

from .commands import app

app(prog_name="python -m bench")
