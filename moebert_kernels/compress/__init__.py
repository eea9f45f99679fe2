"""From a fine-tuned encoder to its MoE: data, importance, adaptation, distillation, report."""
