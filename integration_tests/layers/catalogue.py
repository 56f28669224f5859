"""One case, or several, for every class of `keras.layers`.

A case is a layer behind a projection (`front`) that keeps the shape of its
input, so that a layout of the front's kernel hands the layer a sharded
activation.
"""

import numpy as np
import torch

import keras
from keras import layers
from keras import ops

ROWS = 4
IMAGE = (8, 6, 3)


class Case:
    """A layer and what it is called with.

    Args:
        make: function without arguments, gives the layer.
        shapes: shapes of its inputs without the rows, or arrays.
        front: `"last"` for a projection of each input's last dim, `"height"`
            for one of its first dim, None for none.
        random: whether it draws numbers for rows: then data shards differ by
            design, and only model axes are tried.
        of_all_rows: whether what it gives for a row is of all rows that it is
            handed: then, too, only model axes are tried.
        function: of the layer and the inputs, gives the outputs.
        tolerance: relative difference that rounding explains.
        **kwargs: arguments of the call; arrays have rows.
    """

    def __init__(
        self,
        make,
        *shapes,
        front="last",
        random=False,
        of_all_rows=False,
        function=None,
        tolerance=1e-5,
        **kwargs,
    ):
        self.make, self.shapes, self.front = make, shapes, front
        self.random, self.of_all_rows = random, of_all_rows
        self.function = function
        self.tolerance, self.kwargs = tolerance, kwargs

    @property
    def has_data_shards(self):
        """Whether data shards give what one device gives."""
        return not (self.random or self.of_all_rows)

    def call(self, layer, rows, *inputs):
        if self.function is not None:
            return self.function(layer, *inputs)
        kwargs = {
            name: ops.convert_to_tensor(value[rows])
            if isinstance(value, np.ndarray)
            else value
            for name, value in self.kwargs.items()
        }
        return layer(*inputs, **kwargs)

    def inputs(self):
        rng = np.random.default_rng(3)
        return [
            shape
            if isinstance(shape, np.ndarray)
            else rng.standard_normal((ROWS, *shape)).astype("float32")
            for shape in self.shapes
        ]

    def make_front(self, x, name):
        if self.front is None or x.dtype.kind != "f":
            return None
        if self.front == "last":
            return layers.Dense(x.shape[-1], name=name)
        letters = "bhwc"[: x.ndim]
        return layers.EinsumDense(
            f"{letters},hg->{letters.replace('h', 'g')}",
            (x.shape[1], *x.shape[2:]),
            name=name,
        )


def image(make, **kwargs):
    """A layer of images of three channels, cut along their height."""
    return Case(make, IMAGE, front="height", **kwargs)


def random_image(make):
    return image(make, random=True, training=True)


def listed(layer, *x):
    return layer(list(x))


def merging(make, first=(5, 4), second=(5, 4), **kwargs):
    return Case(make, first, second, function=listed, **kwargs)


def stateful(make, states=1):
    """A cell: one step of a recurrent layer."""
    shapes = ((4,), *((6,),) * states)
    return Case(make, *shapes, function=lambda cell, x, *h: cell(x, list(h)))


class Doubled(layers.Wrapper):
    def call(self, x):
        return self.layer(x) + self.layer(x)


class Raw(layers.Layer):
    """A layer of the user's, in raw torch."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 7), name="kernel")
        self.gain = self.add_weight(shape=(7,), name="gain")

    def call(self, x):
        y = torch.nn.functional.silu(torch.matmul(x, self.kernel))
        return torch.cumsum(y * self.gain, -1) + torch.sort(y, -1)[0]


class Steps(layers.Layer):
    """A layer of the user's, in Keras's operations."""

    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 6), name="table")

    def call(self, x):
        y = keras.ops.matmul(x, self.table)
        top, where = keras.ops.top_k(y, 3)
        taken = keras.ops.take_along_axis(y, where, axis=-1)
        y = keras.ops.slice_update(y, (0, 0, 1), top * 2)
        y = keras.ops.pad(y, ((0, 0), (1, 0), (0, 2)))
        y = keras.ops.reshape(y, (y.shape[0], -1))
        return keras.ops.concatenate(
            [y, keras.ops.reshape(taken, (y.shape[0], -1))], axis=-1
        )


def adapted(layer, data):
    layer.adapt(data)
    return layer


INTEGERS = np.arange(ROWS * 5).reshape(ROWS, 5) % 6
TOKENS = np.arange(ROWS * 6).reshape(ROWS, 6) % 7
MASK = np.array([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 1]], dtype="bool")
KEEP = dict(units=6, return_sequences=True)
LENGTH = np.random.default_rng(0).standard_normal((ROWS, 5, 4))
MASKED = np.concatenate([LENGTH[:, :3], LENGTH[:, 3:] * 0], 1).astype("float32")

# By the name of the class; a list where one case is not enough.
CASES = {
    # Projections
    "Dense": [
        Case(lambda: layers.Dense(7), (6,)),
        Case(lambda: layers.Dense(8, "softmax"), (5, 4)),
    ],
    "EinsumDense": [
        Case(
            lambda: layers.EinsumDense(
                "abc,cde->abde", (None, 4, 3), bias_axes="de"
            ),
            (5, 4),
        ),
        Case(lambda: layers.EinsumDense("abc,bd->adc", (7, 4)), (5, 4)),
    ],
    "Embedding": Case(lambda: layers.Embedding(7, 6), TOKENS),
    "ReversibleEmbedding": [
        Case(lambda: layers.ReversibleEmbedding(7, 6), TOKENS),
        Case(
            lambda: layers.ReversibleEmbedding(7, 4),
            (3, 4),
            function=lambda layer, x: layer(x, reverse=True),
        ),
        Case(
            lambda: layers.ReversibleEmbedding(7, 4, tie_weights=False),
            (3, 4),
            function=lambda layer, x: layer(x, reverse=True),
        ),
    ],
    # Convolutions
    "Conv1D": [
        Case(lambda: layers.Conv1D(6, 3), (7, 4)),
        Case(lambda: layers.Conv1D(7, 2, padding="causal"), (6, 4)),
        Case(lambda: layers.Conv1D(8, 3, groups=4), (6, 4)),
        Case(lambda: layers.Conv1D(6, 3, groups=2), (6, 4)),
        Case(
            lambda: layers.Conv1D(
                4, 3, data_format="channels_first", activation="relu"
            ),
            (4, 8),
            front="height",
        ),
    ],
    "Conv2D": [
        Case(lambda: layers.Conv2D(4, 3, padding="same"), (5, 6, 4)),
        Case(lambda: layers.Conv2D(5, 2, strides=2), (5, 6, 4)),
        Case(lambda: layers.Conv2D(8, 2, dilation_rate=2), (5, 4, 3)),
    ],
    "Conv3D": Case(lambda: layers.Conv3D(4, 2), (3, 4, 3, 4)),
    "Conv1DTranspose": Case(
        lambda: layers.Conv1DTranspose(6, 3, strides=2), (5, 4)
    ),
    "Conv2DTranspose": Case(
        lambda: layers.Conv2DTranspose(4, 2, padding="same"), (4, 3, 4)
    ),
    "Conv3DTranspose": Case(lambda: layers.Conv3DTranspose(4, 2), (2, 3, 2, 4)),
    "DepthwiseConv1D": Case(
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (6, 4)
    ),
    "DepthwiseConv2D": [
        Case(lambda: layers.DepthwiseConv2D(2), (4, 5, 4)),
        Case(lambda: layers.DepthwiseConv2D(2, depth_multiplier=2), (4, 4, 3)),
    ],
    "SeparableConv1D": Case(lambda: layers.SeparableConv1D(6, 3), (6, 4)),
    "SeparableConv2D": Case(
        lambda: layers.SeparableConv2D(5, 2, depth_multiplier=2), (4, 5, 4)
    ),
    # Recurrent layers
    "SimpleRNN": Case(lambda: layers.SimpleRNN(6), (5, 4)),
    "GRU": [
        Case(lambda: layers.GRU(**KEEP), (5, 4)),
        Case(lambda: layers.GRU(5, reset_after=False), (5, 4)),
    ],
    "LSTM": [
        Case(lambda: layers.LSTM(**KEEP, return_state=True), (5, 4)),
        Case(lambda: layers.LSTM(7, go_backwards=True), (5, 4), mask=MASK),
    ],
    "SimpleRNNCell": stateful(lambda: layers.SimpleRNNCell(6)),
    "GRUCell": stateful(lambda: layers.GRUCell(6)),
    "LSTMCell": stateful(lambda: layers.LSTMCell(6), 2),
    "StackedRNNCells": Case(
        lambda: layers.StackedRNNCells(
            [layers.GRUCell(6), layers.SimpleRNNCell(5)]
        ),
        (4,),
        (6,),
        (5,),
        function=lambda cell, x, a, b: cell(x, [a, b]),
    ),
    "RNN": [
        Case(lambda: layers.RNN(layers.SimpleRNNCell(6)), (5, 4)),
        Case(
            lambda: layers.RNN([layers.LSTMCell(6), layers.GRUCell(3)]), (3, 4)
        ),
    ],
    "Bidirectional": Case(
        lambda: layers.Bidirectional(layers.LSTM(**KEEP)), (5, 4), mask=MASK
    ),
    "ConvLSTM1D": Case(lambda: layers.ConvLSTM1D(4, 2), (3, 5, 4)),
    "ConvLSTM2D": Case(lambda: layers.ConvLSTM2D(3, 2), (2, 4, 3, 4)),
    "ConvLSTM3D": Case(lambda: layers.ConvLSTM3D(2, 2), (2, 3, 2, 3, 2)),
    "TimeDistributed": Case(
        lambda: layers.TimeDistributed(layers.Dense(6)), (3, 4)
    ),
    # Attention
    "MultiHeadAttention": [
        Case(lambda: layers.MultiHeadAttention(4, 3), (5, 4), (6, 4)),
        Case(
            lambda: layers.MultiHeadAttention(2, 3, value_dim=2),
            (5, 4),
            (5, 4),
            use_causal_mask=True,
            return_attention_scores=True,
        ),
    ],
    "GroupedQueryAttention": [
        Case(lambda: layers.GroupQueryAttention(3, 4, 2), (5, 4), (6, 4)),
        Case(lambda: layers.GroupQueryAttention(3, 4, 1), (5, 4), (5, 4)),
    ],
    "Attention": Case(
        lambda: layers.Attention(use_scale=True),
        (5, 4),
        (6, 4),
        function=listed,
    ),
    "AdditiveAttention": Case(
        lambda: layers.AdditiveAttention(), (5, 4), (6, 4), function=listed
    ),
    # Normalisations
    "BatchNormalization": Case(
        lambda: layers.BatchNormalization(), (3, 4), training=False
    ),
    "LayerNormalization": [
        Case(lambda: layers.LayerNormalization(), (3, 4)),
        Case(lambda: layers.LayerNormalization(axis=[1, 2]), (4, 5)),
    ],
    "RMSNormalization": Case(lambda: layers.RMSNormalization(), (3, 4)),
    "GroupNormalization": Case(lambda: layers.GroupNormalization(2), (3, 4)),
    "SpectralNormalization": Case(
        lambda: layers.SpectralNormalization(layers.Dense(6)),
        (4,),
        training=True,
    ),
    "UnitNormalization": Case(lambda: layers.UnitNormalization(), (3, 4)),
    "Normalization": Case(
        lambda: adapted(layers.Normalization(), LENGTH), (5, 4)
    ),
    # Activations
    "Activation": Case(lambda: layers.Activation("softmax"), (3, 4)),
    "ELU": Case(lambda: layers.ELU(), (3, 4)),
    "LeakyReLU": Case(lambda: layers.LeakyReLU(), (3, 4)),
    "PReLU": Case(lambda: layers.PReLU(), (3, 4)),
    "ReLU": Case(lambda: layers.ReLU(max_value=1.0), (3, 4)),
    "Softmax": [
        Case(lambda: layers.Softmax(), (3, 4)),
        Case(lambda: layers.Softmax(axis=1), (5, 4)),
    ],
    # Merging
    "Add": merging(lambda: layers.Add()),
    "Average": merging(lambda: layers.Average()),
    "Concatenate": [
        merging(lambda: layers.Concatenate()),
        merging(lambda: layers.Concatenate(axis=1), second=(2, 4)),
    ],
    "Dot": merging(lambda: layers.Dot(axes=2), second=(3, 4)),
    "Maximum": merging(lambda: layers.Maximum()),
    "Minimum": merging(lambda: layers.Minimum()),
    "Multiply": merging(lambda: layers.Multiply(), second=(1, 4)),
    "Subtract": merging(lambda: layers.Subtract()),
    # Pooling
    **{
        f"{kind}Pooling{n}D": [
            Case(
                lambda kind=kind, n=n: getattr(layers, f"{kind}Pooling{n}D")(2),
                (*(5, 4, 3)[:n], 4),
            ),
            Case(
                lambda kind=kind, n=n: getattr(layers, f"{kind}Pooling{n}D")(
                    2, strides=1, padding="same", data_format="channels_first"
                ),
                (4, *(5, 3, 4)[:n]),
            ),
        ]
        for kind in ("Average", "Max")
        for n in (1, 2, 3)
    },
    **{
        f"Global{kind}Pooling{n}D": Case(
            lambda kind=kind, n=n: getattr(layers, f"Global{kind}Pooling{n}D")(
                keepdims=True
            ),
            (*(5, 4, 3)[:n], 4),
        )
        for kind in ("Average", "Max")
        for n in (1, 2, 3)
    },
    **{
        f"Adaptive{kind}Pooling{n}D": Case(
            lambda kind=kind, n=n: getattr(
                layers, f"Adaptive{kind}Pooling{n}D"
            )(2),
            (*(5, 4, 3)[:n], 4),
        )
        for kind in ("Average", "Max")
        for n in (1, 2, 3)
    },
    # Shapes
    **{
        f"{name}{n}D": Case(
            lambda name=name, n=n: getattr(layers, f"{name}{n}D")(1),
            (*(5, 4, 3)[:n], 4),
        )
        for name in ("Cropping", "ZeroPadding", "UpSampling")
        for n in (1, 2, 3)
    },
    "Flatten": Case(lambda: layers.Flatten(), (3, 4)),
    "Permute": Case(lambda: layers.Permute((2, 1)), (3, 4)),
    "RepeatVector": Case(lambda: layers.RepeatVector(3), (4,)),
    "Reshape": [
        Case(lambda: layers.Reshape((4, 3)), (3, 4)),
        Case(lambda: layers.Reshape((3, 2, 2)), (3, 4)),
    ],
    "Identity": Case(lambda: layers.Identity(), (3, 4)),
    "Lambda": Case(lambda: layers.Lambda(lambda x: x * x[:, :1]), (3, 4)),
    "Masking": Case(
        lambda: keras.Sequential(
            [layers.Masking(), layers.Dense(4), layers.LSTM(**KEEP)]
        ),
        MASKED,
        front=None,
    ),
    "Wrapper": Case(lambda: Doubled(layers.Dense(6)), (4,)),
    "TorchModuleWrapper": Case(
        lambda: layers.TorchModuleWrapper(torch.nn.Linear(4, 6)), (4,)
    ),
    "Layer": [Case(Raw, (3, 4)), Case(Steps, (3, 4))],
    # Regularisation
    "ActivityRegularization": Case(
        lambda: layers.ActivityRegularization(l2=0.1), (3, 4)
    ),
    "Dropout": Case(
        lambda: layers.Dropout(0.4, seed=1), (4,), random=True, training=True
    ),
    **{
        f"SpatialDropout{n}D": Case(
            lambda n=n: getattr(layers, f"SpatialDropout{n}D")(0.4, seed=1),
            (*(3, 2, 2)[:n], 4),
            random=True,
            training=True,
        )
        for n in (1, 2, 3)
    },
    **{
        name: Case(
            lambda name=name: getattr(layers, name)(0.4, seed=1),
            (3, 4),
            random=True,
            training=True,
        )
        for name in ("AlphaDropout", "GaussianDropout", "GaussianNoise")
    },
    # Preprocessing, before a projection
    "CategoryEncoding": Case(
        lambda: keras.Sequential(
            [layers.CategoryEncoding(6, output_mode="count"), layers.Dense(4)]
        ),
        INTEGERS,
    ),
    "Discretization": Case(
        lambda: keras.Sequential(
            [
                layers.Discretization([-1.0, 0.0, 1.0], output_mode="one_hot"),
                layers.Dense(4),
            ]
        ),
        (1,),
        front=None,
    ),
    "Rescaling": Case(lambda: layers.Rescaling(0.5, 1.0), (3, 4)),
    "MelSpectrogram": Case(
        lambda: layers.MelSpectrogram(
            num_mel_bins=4, fft_length=16, sequence_stride=8
        ),
        (64,),
    ),
    "STFTSpectrogram": Case(
        lambda: layers.STFTSpectrogram(
            frame_length=8, frame_step=4, fft_length=8
        ),
        (32, 1),
        front="height",
        tolerance=1e-4,
    ),
    # Images
    "CenterCrop": image(lambda: layers.CenterCrop(4, 3)),
    "Resizing": image(lambda: layers.Resizing(5, 7)),
    "AutoContrast": image(lambda: layers.AutoContrast()),
    "ContrastLimitedAdaptiveHistogramEqualization": image(
        lambda: layers.ContrastLimitedAdaptiveHistogramEqualization(
            tile_grid_size=(2, 2)
        )
    ),
    # Keras takes one histogram of all images.
    "Equalization": image(lambda: layers.Equalization(), of_all_rows=True),
    "Solarization": random_image(lambda: layers.Solarization(0.1, 0.2)),
    **{
        f"Random{name}": random_image(
            lambda name=name, args=args: getattr(layers, f"Random{name}")(
                *args, seed=1
            )
        )
        for name, args in {
            "Brightness": (0.2,),
            "ColorDegeneration": (0.5,),
            "ColorJitter": (),
            "Contrast": (0.3,),
            "Crop": (5, 4),
            "ElasticTransform": (),
            "Erasing": (),
            "Flip": (),
            "GaussianBlur": (),
            "Grayscale": (),
            "Hue": (0.3,),
            "Invert": (),
            "Perspective": (),
            "Posterization": (4,),
            "Rotation": (0.2,),
            "Saturation": (0.5,),
            "Sharpness": (0.5,),
            "Shear": (0.2, 0.2),
            "Translation": (0.2, 0.2),
            "Zoom": (0.2,),
        }.items()
    },
    "RandAugment": random_image(lambda: layers.RandAugment(seed=1)),
    "AugMix": random_image(lambda: layers.AugMix(seed=1)),
    "Pipeline": random_image(
        lambda: layers.Pipeline(
            [layers.RandomFlip(seed=1), layers.Rescaling(0.5)]
        )
    ),
    "MixUp": random_image(lambda: layers.MixUp(seed=1)),
    "CutMix": random_image(lambda: layers.CutMix(seed=1)),
}

# Classes that no case here can try.
ELSEWHERE = {
    "FlaxLayer": "runs on JAX alone",
    "JaxLayer": "runs on JAX alone",
    "TFSMLayer": "runs on TensorFlow alone",
    "InputLayer": "is never called",
    "MaxNumBoundingBoxes": "pads labels before training, with no tensor of it",
    "StringLookup": "takes strings, which no tensor of torch holds",
    "Hashing": "needs TensorFlow",
    "IntegerLookup": "needs TensorFlow",
    "HashedCrossing": "takes strings or integers of a data pipeline",
    "TextVectorization": "takes strings, which no tensor of torch holds",
}


def classes():
    """Every layer class, by the name that it calls itself."""
    found = {}
    for name in dir(layers):
        value = getattr(layers, name)
        if isinstance(value, type) and issubclass(value, layers.Layer):
            found[value.__name__] = value
    return found


def cases():
    """`{name: Case}`: numbered where a class has several."""
    result = {}
    for name, value in CASES.items():
        if isinstance(value, Case):
            result[name] = value
            continue
        for number, case in enumerate(value, 1):
            result[f"{name}-{number}"] = case
    return result
