"""Tiles so small that small cases have many; 32 products a step are the least that add up in two chains."""

from moebert_kernels.kernels.triton.configs import Config, Tile

SQUARE = Tile(16, 16, 32, 4, 2)
WIDE = Tile(16, 32, 32, 4, 2, parts=4)
PLAIN = Config(SQUARE, SQUARE, SQUARE, SQUARE, Tile(16, 16, 16, 4, 2))
STREAMED = Config(WIDE, WIDE, WIDE, WIDE, Tile(16, 32, 16, 4, 2), stream_k=True, tma=True)
