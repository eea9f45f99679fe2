"""`python -m bench`."""

from .commands import main

main()
