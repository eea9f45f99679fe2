"""Times the native host builder beside a torch.argsort dispatch, layer by layer: `time_plans.py [T E L]`.

Both give order, inverse, counts and offsets of every layer from token ids and tables; runs are interleaved.
"""

import statistics
import sys
import time

import torch

from moebert_kernels.routing import native_plans

num_tokens, num_experts, num_layers = (int(a) for a in sys.argv[1:4] or (65536, 4, 12))
input_ids_T = torch.randint(30522, (num_tokens,))
tables_LV = torch.randint(num_experts, (num_layers, 30522), dtype=torch.int32)
position_T = torch.arange(num_tokens)


def argsort_dispatch():
    for table_V in tables_LV:
        expert_ids_T = table_V[input_ids_T]
        order_T = torch.argsort(expert_ids_T, stable=True)
        inverse_T = torch.empty_like(order_T)
        inverse_T[order_T] = position_T
        torch.bincount(expert_ids_T, minlength=num_experts).cumsum(0)


def native_dispatch():
    native_plans.from_input_ids(input_ids_T, tables_LV, None, num_experts)


def spread(samples):
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(samples, n=10)
    return f"{statistics.median(samples):.3f} ms ({deciles[0]:.3f} to {deciles[-1]:.3f})"


def milliseconds(build):
    start = time.perf_counter()
    build()
    return 1e3 * (time.perf_counter() - start)


for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    pairs = [(milliseconds(argsort_dispatch), milliseconds(native_dispatch)) for _ in range(105)][5:]
    dispatch, plans = zip(*pairs, strict=True)
    ratio = statistics.median(dispatch) / statistics.median(plans)
    print(
        f"T={num_tokens} E={num_experts} L={num_layers}, {num_threads} threads: "
        f"argsort dispatch {spread(dispatch)}, native {spread(plans)}, "
        f"{ratio:.1f}x; medians and 10th to 90th percentile of {len(pairs)} interleaved repetitions"
    )
