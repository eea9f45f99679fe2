"""The operator's backends: Triton's kernels, the CPU's row kernels of csrc/, and plain PyTorch.

Each of the packages `triton`, `cpu` and `torch` has the same two functions:

    forward(call, training, kept) -> (y_TD, Saved)
    backward(call, saved, dy_TD, needs, kept) -> Gradients

in the terms of `call`. `kept` is a dictionary of its own for all calls of the same form. None of the three
knows another, and nothing is imported here: `triton` needs Triton, and two have the names of packages.
"""
