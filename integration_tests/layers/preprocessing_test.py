"""Every preprocessing layer of Keras, in a model that is trained."""

import inspect
import time

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(120)]

IMAGES = {
    "AugMix": {},
    "AutoContrast": {},
    "CenterCrop": {"height": 6, "width": 6},
    "ContrastLimitedAdaptiveHistogramEqualization": {"tile_grid_size": (2, 2)},
    "CutMix": {},
    "Equalization": {},
    "MixUp": {},
    "RandAugment": {},
    "RandomBrightness": {"factor": 0.2},
    "RandomColorDegeneration": {"factor": 0.5},
    "RandomColorJitter": {"brightness_factor": 0.2, "hue_factor": 0.1},
    "RandomContrast": {"factor": 0.2},
    "RandomCrop": {"height": 8, "width": 8},
    "RandomElasticTransform": {},
    "RandomErasing": {},
    "RandomFlip": {},
    "RandomGaussianBlur": {},
    "RandomGrayscale": {},
    "RandomHue": {"factor": 0.2},
    "RandomInvert": {},
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 4},
    "RandomRotation": {"factor": 0.2},
    "RandomSaturation": {"factor": 0.5},
    "RandomSharpness": {"factor": 0.3},
    "RandomShear": {"x_factor": 0.2, "y_factor": 0.1},
    "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
    "RandomZoom": {"height_factor": 0.2},
    "Rescaling": {"scale": 0.5},
    "Resizing": {"height": 6, "width": 6},
    "Solarization": {},
}
# Of vectors of eight numbers, that are whole where the layer asks for such.
OTHERS = {
    "CategoryEncoding": lambda: layers.CategoryEncoding(
        8, output_mode="multi_hot"
    ),
    "Discretization": lambda: layers.Discretization([0.5, 2.5, 5.0]),
    "MelSpectrogram": lambda: layers.MelSpectrogram(
        num_mel_bins=3, fft_length=4, sequence_stride=2, sampling_rate=100
    ),
    "Normalization": lambda: layers.Normalization(mean=3.0, variance=2.0),
    "Pipeline": lambda: layers.Pipeline(
        [layers.Rescaling(0.5), layers.Rescaling(2.0, 1.0)]
    ),
    "STFTSpectrogram": lambda: layers.STFTSpectrogram(
        frame_length=4, frame_step=2, fft_length=4
    ),
}
# They want strings, or TensorFlow, or no images but boxes.
NOT_HERE = {
    "HashedCrossing",
    "Hashing",
    "IntegerLookup",
    "MaxNumBoundingBoxes",
    "StringLookup",
    "TextVectorization",
}


def test_none_is_forgotten():
    names = {
        name
        for name, kind in vars(layers).items()
        if inspect.isclass(kind) and ".preprocessing." in kind.__module__
    }
    assert names == {*IMAGES, *OTHERS} | NOT_HERE


def make_of_images(name):
    kind, arguments = getattr(layers, name), dict(IMAGES[name])
    if "seed" in inspect.signature(kind).parameters:
        arguments["seed"] = 3
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            kind(**arguments),
            layers.Rescaling(1 / 255.0),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )


class Times(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(time.perf_counter() - self.start)


def fit(model, x, batch_size):
    rng = np.random.default_rng(1)
    y = rng.standard_normal((len(x), *model.output_shape[1:]))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    times = Times()
    history = model.fit(
        x,
        y.astype("float32"),
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[times],
    )
    first, *others = times.steps
    assert first <= 1 + 3 * np.median(others), times.steps
    return history.history


def check(make_model, x, batch_size):
    def program(model):
        return fit(model, x, batch_size)

    expected = parity.run(program, make_model)
    distribution = keras.distribution.DataParallel()
    distribution.draw_global_batch = True
    actual = parity.run(program, make_model, distribution)
    parity.assert_equal_on_all("DataParallel", actual, expected, 2e-5)


def images(rows):
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (rows, 8, 8, 3)).astype("float32")


# Of the last batch a shard has two rows, and the other three.
@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    check(lambda: make_of_images(name), images(19), 7)


# A prime number of rows.
@pytest.mark.parametrize(
    "name",
    [
        "RandomPerspective",
        "RandomRotation",
        "RandomShear",
        "RandomZoom",
    ],
)
def test_many_rows(name):
    check(lambda: make_of_images(name), images(1009), 337)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers(name):
    def make():
        inputs = keras.Input((8,), dtype="int32" if is_whole else "float32")
        x = inputs
        if name == "STFTSpectrogram":
            x = layers.Reshape((8, 1))(x)
        x = OTHERS[name]()(x)
        x = layers.Rescaling(0.1)(layers.Flatten()(x))
        return keras.Model(inputs, layers.Dense(2)(x))

    is_whole = name == "CategoryEncoding"
    x = np.random.default_rng(0).integers(0, 8, (19, 8))
    check(make, x.astype("int32" if is_whole else "float32"), 7)
