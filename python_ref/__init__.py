"""The whole MoEBERT method in plain PyTorch: the specification that the fast code is tested against.

One module per step of the paper (Zuo et al., NAACL 2022, arXiv 2204.07675):

* `ffn` - the dense feed-forward layer and the mixture of experts (Eq. 1, 2)
* `routing` - which expert a token goes to (Eq. 3 and hash routing), and the order experts read tokens in
* `importance` - what a neuron is worth to the task (Eq. 4)
* `adaptation` - how a dense layer becomes experts (section 3.1)
* `fitting` - how experts are fitted to what the dense layer does (not in the paper)
* `distillation` - what the student is trained on (Eq. 5 to 7)

Every function names the equation it is, or the authors' code (github.com/SimiaoZuo/MoEBERT) where the paper
is silent. All of it runs in float64 and on any device; none of it is meant to be fast.

Names end in their shape: T tokens (batch x sequence), B batch, S sequence, D hidden size, F neurons, E
experts, K experts per token, L layers, V vocabulary, C classes.
"""
