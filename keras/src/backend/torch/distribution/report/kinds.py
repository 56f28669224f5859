"""What operators of torch do to the dims of what they are handed: `flow`."""

COPIES = frozenset(
    "alias clone contiguous copy detach empty_like lift_fresh to_copy".split()
)
ELEMENTWISE = COPIES | frozenset(
    """
    abs add addcmul atan bernoulli bitwise_and bitwise_not clamp cos div elu eq
    erf exp fill ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu log
    log1p logical_and logical_not logical_or lt masked_fill maximum minimum mish
    mul ne neg ones_like pow reciprocal relu rsqrt rsub sigmoid sign silu sin
    softplus sqrt square sub tanh where zeros_like
    """.split()
)
SUMS = frozenset(["add", "sub", "rsub"])
# They mix, or take apart, a dim: the index of the argument that names it.
ALONG = {
    "softmax": 1,
    "safe_softmax": 1,
    "log_softmax": 1,
    "cumsum": 1,
    "topk": 2,
    "sort": 1,
    "slice": 1,
    "split": 2,
    "split_with_sizes": 2,
    "index_select": 1,
    "gather": 1,
    "select": 1,
    "unbind": 1,
    "flip": 1,
    "roll": 2,
}
REMOVE = ("select", "unbind")
REDUCE = ("sum", "mean", "amax", "amin", "prod", "var", "all", "any")
