"""What the kernels aim at: BERT-base MoEBERT's layer, bfloat16, a CUDA graph, cold caches.

Stated for an H200. What is kept on another card is the ratio of aim and floor, the floor by its own ceilings.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One line of the table of aims.

    Attributes:
        tokens: T, at hidden size 768, experts of 768 neurons, E = 4, K = 1, the plan given.
        pass_: of the ffn benchmark.
        floor_us: the roofline at 790 TFLOP/s and 4.3 TB/s.
        aim_us: what is aimed at; None where there is no aim.
    """

    tokens: int
    pass_: str
    floor_us: float
    aim_us: float | None

    def aim_s(self, floor_s: float) -> float | None:
        """The aim in seconds on a card whose own measured ceilings give this floor."""
        return None if self.aim_us is None else floor_s * self.aim_us / self.floor_us


TARGETS = (
    Target(64, "forward", 2.2, 8),
    Target(512, "forward", 2.6, 10),
    Target(4096, "forward", 12.2, 19),
    Target(16384, "forward", 48.9, 64),
    Target(65536, "forward", 196, 240),
    Target(64, "forward+backward", 6.7, None),
    Target(512, "forward+backward", 7.9, None),
    Target(4096, "forward+backward", 36.7, 60),
    Target(16384, "forward+backward", 147, 210),
    Target(65536, "forward+backward", 587, 800),
)


def target_of(tokens: int, pass_: str) -> Target | None:
    """The line of the table for so many tokens and that pass, if it has one."""
    return next((line for line in TARGETS if (line.tokens, line.pass_) == (tokens, pass_)), None)
