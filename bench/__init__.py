"""Microbenchmarks: kernels, dispatch, whole models and importance, with the peers beside us."""
