"""MoEBERT: fine-tuned encoders whose feed-forward networks become fast, importance-guided experts."""

__version__ = "0.1.0"
