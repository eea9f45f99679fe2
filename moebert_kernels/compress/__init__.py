"""From a fine-tuned encoder to a distilled MoEBERT: importance, adaptation, distillation, evaluation."""
