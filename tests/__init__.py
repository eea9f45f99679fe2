"""The tests, in folders as the code they test; what they share is imported as `tests.NAME`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
