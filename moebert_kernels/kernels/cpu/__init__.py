"""The operator on the CPU: torch's GEMMs, with the row kernels of csrc/ for everything between them.

backend.py   which calls are served; the norm and both ends of the rows' way
experts.py   their way through the experts
rows.py      how they are laid out
"""

from moebert_kernels.kernels.cpu.backend import backward, forward, serves
from moebert_kernels.kernels.cpu.rows import most_rows

__all__ = ["backward", "forward", "most_rows", "serves"]
