"""What the layers of a student are given, and what they give."""

import torch

from moebert_kernels import MoEFFN
from moebert_kernels.models import is_moe
from tests import tiny


def batches(count=3):
    return [tiny.batch(batch_size=4, length=7 + i, seed=i) for i in range(count)]


def experts_of(student):
    return [module for module in student.modules() if isinstance(module, MoEFFN)]


@torch.no_grad()
def calls_of(module, model, rows):
    """(input, keyword arguments, output) of a module, for every batch that the model runs on."""
    found = []

    def note(_, args, kwargs, output):
        found.append((args[0], kwargs, output))

    hook = module.register_forward_hook(note, with_kwargs=True)
    as_it_is = {"pack": False} if is_moe(model.config) else {}
    for batch in rows:
        model(**batch, **as_it_is)
    hook.remove()
    return found


def tokens(states):
    return torch.cat([x_BSD.flatten(0, 1) for x_BSD in states])
