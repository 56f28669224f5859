"""What `keras.ops` does with a batch of rows: which functions gather.

All give what one device gives. Of those that treat rows one by one none may
gather, so that code which is row-wise does not communicate.
"""

import torch

import keras
from keras import ops
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows import rules  # noqa: F401
from keras.src.backend.torch.distribution.global_rows.table_test import Case
from keras.src.backend.torch.distribution.global_rows.table_test import InRows
from keras.src.backend.torch.distribution.global_rows.table_test import check
from keras.src.backend.torch.distribution.global_rows.table_test import seed

# x: (5, 4, 6) floats, i: (5, 4) ints of 0 to 5; both have rows in dim 0.
UNARY = """
    abs absolute arccos arccosh arcsin arcsinh arctan arctanh cbrt ceil cos
    cosh deg2rad erf erfinv exp exp2 expm1 floor isfinite isinf isnan log
    log10 log1p log2 log_sigmoid logical_not negative rad2deg reciprocal relu
    relu6 round rsqrt selu sigmoid sign silu sin sinh soft_shrink softplus
    softsign sparse_plus sqrt square squareplus swish tan tanh tanh_shrink
    trunc celu elu gelu glu hard_shrink hard_sigmoid hard_silu hard_swish
    hard_tanh leaky_relu log_softmax softmax sparsemax nan_to_num angle real
    ones_like zeros_like copy stop_gradient signbit sinc
""".split()
BINARY = """
    add subtract multiply divide true_divide divide_no_nan power maximum
    minimum mod floor_divide arctan2 equal not_equal greater greater_equal
    less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor
    hypot nextafter heaviside
""".split()
REDUCTIONS = """
    sum mean max min prod var std any all argmax argmin amax amin median
    logsumexp count_nonzero cumsum cumprod sort argsort nansum nanmean nanmax
    nanmin norm ptp average
""".split()


def functions():
    """The functions of `keras.ops` by name, of what is row-wise in them."""
    found = {}
    for name in UNARY:
        found[name] = lambda x, i, f=getattr(ops, name): f(x)
    for name in BINARY:
        f = getattr(ops, name)
        found[name] = lambda x, i, f=f: f(x, x + 1)
        found[f"{name} of whole"] = lambda x, i, f=f: f(x, torch.ones(6))
    for name in REDUCTIONS:
        f = getattr(ops, name)
        found[f"{name} inside"] = lambda x, i, f=f: f(x, axis=-1)
        found[f"{name} of columns"] = lambda x, i, f=f: f(x, axis=1)
    found.update(OTHERS)
    return found


KERNEL = torch.linspace(-1, 1, 24).reshape(2, 6, 2)
OTHERS = {
    "scale": lambda x, i: (x - 1.0) * 2 + 3,
    "number": lambda x, i: 2 / (1 + ops.exp(-x)),
    "clip": lambda x, i: ops.clip(x, -1.0, 1.0),
    "cast": lambda x, i: ops.cast(x, "float64"),
    "convert": lambda x, i: ops.convert_to_tensor(x) * 2,
    "where": lambda x, i: ops.where(x > 0, x, ops.zeros_like(x)),
    "where of number": lambda x, i: ops.where(x > 0, x, 0.0),
    "isclose": lambda x, i: ops.isclose(x, x),
    "lerp": lambda x, i: x + 0.3 * (x * 2 - x),
    "matmul": lambda x, i: ops.matmul(x, torch.ones(6, 3)),
    "dot": lambda x, i: ops.dot(x, torch.ones(6, 3)),
    "batched": lambda x, i: ops.matmul(x, ops.swapaxes(x, 1, 2)),
    "einsum": lambda x, i: ops.einsum("abc,cd->abd", x, torch.ones(6, 3)),
    "einsum both": lambda x, i: ops.einsum("abc,abd->acd", x, x),
    "einsum dots": lambda x, i: ops.einsum(
        "...c,cd->...d", x, torch.ones(6, 3)
    ),
    "tensordot": lambda x, i: ops.tensordot(x, torch.ones(6, 3), axes=1),
    "inner": lambda x, i: ops.inner(x, torch.ones(6)),
    "vecdot": lambda x, i: ops.sum(x * x, -1),
    "reshape": lambda x, i: ops.reshape(x, (-1, 24)),
    "reshape of shape": lambda x, i: ops.reshape(x, (ops.shape(x)[0], -1)),
    "reshape together": lambda x, i: ops.reshape(x, (-1, 6)),
    "ravel rows": lambda x, i: ops.ravel(x),
    "transpose": lambda x, i: ops.transpose(x, (0, 2, 1)),
    "transpose rows": lambda x, i: ops.transpose(x, (1, 0, 2)),
    "swapaxes": lambda x, i: ops.swapaxes(x, 1, 2),
    "moveaxis": lambda x, i: ops.moveaxis(x, -1, 1),
    "expand_dims": lambda x, i: ops.expand_dims(x, 1),
    "squeeze": lambda x, i: ops.squeeze(ops.expand_dims(x, 1), 1),
    "squeeze all": lambda x, i: ops.squeeze(x[:, :1]),
    "repeat": lambda x, i: ops.repeat(x, 2, axis=1),
    "tile": lambda x, i: ops.tile(x, (1, 2, 1)),
    "broadcast_to": lambda x, i: ops.broadcast_to(x, (5, 4, 6)),
    "concatenate": lambda x, i: ops.concatenate([x, x * 2], axis=-1),
    "concatenate whole": lambda x, i: ops.concatenate(
        [x, torch.ones(5, 1, 6)], axis=1
    ),
    "append": lambda x, i: ops.append(x, x, axis=1),
    "stack": lambda x, i: ops.stack([x, x], axis=1),
    "hstack": lambda x, i: ops.hstack([x, x]),
    "split": lambda x, i: ops.split(x, 2, axis=-1)[1],
    "unstack": lambda x, i: ops.unstack(x, axis=1)[0],
    "flip": lambda x, i: ops.flip(x, axis=1),
    "roll": lambda x, i: ops.roll(x, 1, axis=1),
    "pad": lambda x, i: ops.pad(x, [[0, 0], [1, 1], [0, 2]]),
    "slice inside": lambda x, i: x[:, 1:3, 0],
    "ellipsis": lambda x, i: x[..., :2],
    "new axis": lambda x, i: x[:, None],
    "last": lambda x, i: x[:, -1],
    "take": lambda x, i: ops.take(torch.ones(7, 3), i, axis=0),
    "take inside": lambda x, i: ops.take(x, torch.tensor([0, 2]), axis=1),
    "take_along_axis": lambda x, i: ops.take_along_axis(
        x, i[..., None], axis=2
    ),
    "one_hot": lambda x, i: ops.one_hot(i, 6),
    "multi_hot": lambda x, i: ops.multi_hot(i, 6),
    "embedding": lambda x, i: torch.nn.functional.embedding(
        i, torch.ones(6, 3)
    ),
    "top_k": lambda x, i: ops.top_k(x, 2)[0],
    "in_top_k": lambda x, i: ops.in_top_k(i[:, 0], x[:, 0], 2),
    "softmax over axis": lambda x, i: ops.softmax(x, axis=1),
    "softmax over two": lambda x, i: ops.softmax(x, axis=(1, 2)),
    "normalize": lambda x, i: ops.normalize(x, axis=-1),
    "norm of two": lambda x, i: ops.norm(x, axis=(1, 2)),
    "moments": lambda x, i: ops.moments(x, axes=[1, 2])[1],
    "layer norm by hand": lambda x, i: (
        (x - ops.mean(x, -1, keepdims=True))
        / ops.sqrt(ops.var(x, -1, keepdims=True) + 1e-3)
    ),
    "layer_normalization": lambda x, i: ops.layer_normalization(
        x, torch.ones(6), torch.zeros(6)
    ),
    "rms_normalization": lambda x, i: ops.rms_normalization(x, torch.ones(6)),
    "binary_crossentropy": lambda x, i: ops.binary_crossentropy(
        ops.sigmoid(x * 2), ops.sigmoid(x)
    ),
    "binary_crossentropy of logits": lambda x, i: ops.binary_crossentropy(
        ops.sigmoid(x), x, from_logits=True
    ),
    "categorical_crossentropy": lambda x, i: ops.categorical_crossentropy(
        ops.softmax(x * 2), ops.softmax(x)
    ),
    "categorical_crossentropy of logits": lambda x, i: (
        ops.categorical_crossentropy(ops.softmax(x), x, from_logits=True)
    ),
    "sparse_categorical_crossentropy": lambda x, i: (
        ops.sparse_categorical_crossentropy(i, ops.softmax(x))
    ),
    "sparse_categorical_crossentropy of logits": lambda x, i: (
        ops.sparse_categorical_crossentropy(i, x, from_logits=True)
    ),
    "conv": lambda x, i: ops.conv(x, KERNEL, padding="same"),
    "conv strided": lambda x, i: ops.conv(x, KERNEL, strides=2),
    "depthwise_conv": lambda x, i: ops.depthwise_conv(x, KERNEL[..., :1]),
    "conv_transpose": lambda x, i: ops.conv_transpose(
        x, KERNEL.transpose(1, 2), strides=2
    ),
    "max_pool": lambda x, i: ops.max_pool(x, 2),
    "average_pool": lambda x, i: ops.average_pool(x, 2, padding="same"),
    "dot_product_attention": lambda x, i: ops.dot_product_attention(
        x[:, :, None], x[:, :, None], x[:, :, None]
    ),
    "tril": lambda x, i: ops.tril(x),
    "triu": lambda x, i: ops.triu(x, 1),
    "diff": lambda x, i: ops.diff(x, axis=1),
    "cross": lambda x, i: ops.cross(x[..., :3], x[..., 3:]),
    "cumulative": lambda x, i: ops.cumsum(x, axis=1),
    "logical": lambda x, i: ops.logical_and(x > 0, x < 1),
    "digitize": lambda x, i: ops.digitize(x, torch.tensor([-1.0, 0.0, 1.0])),
    "bitwise": lambda x, i: ops.bitwise_and(i, 3),
    "cond": lambda x, i: ops.cast(i > 2, x.dtype),
    "huber": lambda x, i: keras.losses.huber(x, x * 2),
    "mse": lambda x, i: keras.losses.mean_squared_error(x, x * 2),
    "cosine": lambda x, i: keras.losses.cosine_similarity(x, x + 1),
    "kld": lambda x, i: keras.losses.kl_divergence(
        ops.softmax(x), ops.softmax(x * 2)
    ),
    "hinge": lambda x, i: keras.losses.hinge(x, x * 2),
    "log_cosh": lambda x, i: keras.losses.log_cosh(x, x * 2),
    "poisson": lambda x, i: keras.losses.poisson(ops.exp(x), ops.exp(x)),
    "accuracy": lambda x, i: keras.metrics.sparse_categorical_accuracy(i, x),
}

# torch's `quantile`, of which there is no rule.
GATHERING = {"median inside", "median of columns"}


def test_what_gathers(on_threads):
    seed()
    x, i = torch.randn(5, 4, 6), torch.randint(0, 6, (5, 4))
    gathering = set()

    def watched(name, function):
        def call(x, i):
            y = function(x, i)
            if type(x) is carrier.GlobalTensor and not carrier.is_rows(y):
                gathering.add(name)
            return y

        return call

    spread = [InRows(0), InRows(0)]
    cases = [
        Case(name, watched(name, f), [x, i], spread, [(3, 2), (3, 2)])
        for name, f in functions().items()
    ]
    check(on_threads, 2, cases)
    assert gathering == GATHERING
