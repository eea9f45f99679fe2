"""A tiny sentence-embedding model of any family, in a folder as sentence-transformers writes it."""

from __future__ import annotations

import json
from pathlib import Path

from tests import tiny

TEXTS = [" ".join(f"w{(7 * i + j * j) % 60}" for j in range(2 + i % 9)) for i in range(24)]


def make_folder(
    folder: Path, name: str = "Bert", pooling: str = "mean", normalize: bool = True, **changes
) -> Path:
    """A tiny model, as sentence_transformers 2 wrote it for "mean" and as version 5 and later for "cls"."""
    (folder / "1_Pooling").mkdir(parents=True)
    inputs = ["input_ids", "attention_mask"]
    tiny.tokenizer(folder, model_input_names=inputs).save_pretrained(folder)
    tiny.build_family(name, pad_token_id=0, **changes).save_pretrained(folder)
    old = {f"pooling_mode_{mode}": mode == f"{pooling}_tokens" for mode in ("cls_token", "mean_tokens")}
    config = {"word_embedding_dimension": 32, **(old if pooling == "mean" else {"pooling_mode": pooling})}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds[: 3 if normalize else 2])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    return folder
