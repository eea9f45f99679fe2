"""Benchmarks: the expert FFN, its dispatch, whole models and importance, with the peers beside us.

`python -m bench --help` in a checkout; the wheel has this package as `moebert_kernels.bench`, behind
`moebert bench`. An operator is described once, in a module of its own (`ffn`, `dispatch`, `model`,
`importance`): inputs, float64 reference, entries, work. `run` verifies every entry against the reference
and only then times it.

Shape suffixes: T tokens, D hidden size, F neurons of one expert, E experts, K experts per token, S slots,
L layers, V vocabulary.
"""
