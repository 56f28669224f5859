"""Every metric of Keras over uneven data shards is that of one device."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import keras
from integration_tests.harness import parity
from keras import layers
from keras import metrics
from keras import ops

pytestmark = pytest.mark.world(2)

# Batches of 4: of the last one, a data shard has no row.
ROWS, BATCH, FEATURES, CLASSES = 9, 4, 5, 3

by_class = {"num_classes": CLASSES, "target_class_ids": [0, 2]}

# By what the model gives and is to give: how each metric is made.
CASES = {
    "numbers": {
        "Mean": None,
        "Sum": None,
        "MeanMetricWrapper": lambda **kwargs: metrics.MeanMetricWrapper(
            keras.losses.huber, **kwargs
        ),
        "ConcordanceCorrelation": metrics.ConcordanceCorrelation,
        "PearsonCorrelation": metrics.PearsonCorrelation,
        "CosineSimilarity": metrics.CosineSimilarity,
        "LogCoshError": metrics.LogCoshError,
        "MeanAbsoluteError": metrics.MeanAbsoluteError,
        "MeanAbsolutePercentageError": metrics.MeanAbsolutePercentageError,
        "MeanSquaredError": metrics.MeanSquaredError,
        "MeanSquaredLogarithmicError": metrics.MeanSquaredLogarithmicError,
        "R2Score": metrics.R2Score,
        "R2Score, raw": lambda **kwargs: metrics.R2Score(
            class_aggregation=None, **kwargs
        ),
        "R2Score, adjusted": lambda **kwargs: metrics.R2Score(
            class_aggregation="variance_weighted_average",
            num_regressors=1,
            **kwargs,
        ),
        "RootMeanSquaredError": metrics.RootMeanSquaredError,
    },
    "classes": {
        "CategoricalAccuracy": metrics.CategoricalAccuracy,
        "TopKCategoricalAccuracy": lambda **kwargs: (
            metrics.TopKCategoricalAccuracy(k=2, **kwargs)
        ),
        "CategoricalCrossentropy": metrics.CategoricalCrossentropy,
        "CategoricalHinge": metrics.CategoricalHinge,
        "KLDivergence": metrics.KLDivergence,
        "Poisson": metrics.Poisson,
        "F1Score": metrics.F1Score,
        "F1Score, weighted": lambda **kwargs: metrics.F1Score(
            average="weighted", threshold=0.4, **kwargs
        ),
        "FBetaScore": lambda **kwargs: metrics.FBetaScore(
            average="micro", beta=2.0, **kwargs
        ),
        "OneHotIoU": lambda **kwargs: metrics.OneHotIoU(**by_class, **kwargs),
        "OneHotMeanIoU": lambda **kwargs: metrics.OneHotMeanIoU(
            num_classes=CLASSES, **kwargs
        ),
        "Precision": lambda **kwargs: metrics.Precision(
            class_id=1, top_k=2, **kwargs
        ),
        "AUC, labels": lambda **kwargs: metrics.AUC(
            num_thresholds=9, multi_label=True, num_labels=CLASSES, **kwargs
        ),
    },
    "ids": {
        "SparseCategoricalAccuracy": metrics.SparseCategoricalAccuracy,
        "SparseTopKCategoricalAccuracy": lambda **kwargs: (
            metrics.SparseTopKCategoricalAccuracy(k=2, **kwargs)
        ),
        "SparseCategoricalCrossentropy": (
            metrics.SparseCategoricalCrossentropy
        ),
        "IoU": lambda **kwargs: metrics.IoU(
            **by_class, sparse_y_pred=False, **kwargs
        ),
        "MeanIoU": lambda **kwargs: metrics.MeanIoU(
            num_classes=CLASSES, sparse_y_pred=False, **kwargs
        ),
    },
    "yes or no": {
        "Accuracy": metrics.Accuracy,
        "BinaryAccuracy": metrics.BinaryAccuracy,
        "BinaryCrossentropy": metrics.BinaryCrossentropy,
        "BinaryIoU": metrics.BinaryIoU,
        "Hinge": metrics.Hinge,
        "SquaredHinge": metrics.SquaredHinge,
        "AUC": lambda **kwargs: metrics.AUC(num_thresholds=9, **kwargs),
        "FalseNegatives": metrics.FalseNegatives,
        "FalsePositives": metrics.FalsePositives,
        "TrueNegatives": metrics.TrueNegatives,
        "TruePositives": metrics.TruePositives,
        "Precision": lambda **kwargs: metrics.Precision(
            thresholds=[0.3, 0.5], **kwargs
        ),
        "Recall": metrics.Recall,
        "PrecisionAtRecall": lambda **kwargs: metrics.PrecisionAtRecall(
            0.5, num_thresholds=9, **kwargs
        ),
        "RecallAtPrecision": lambda **kwargs: metrics.RecallAtPrecision(
            0.5, num_thresholds=9, **kwargs
        ),
        "SensitivityAtSpecificity": lambda **kwargs: (
            metrics.SensitivityAtSpecificity(0.5, num_thresholds=9, **kwargs)
        ),
        "SpecificityAtSensitivity": lambda **kwargs: (
            metrics.SpecificityAtSensitivity(0.5, num_thresholds=9, **kwargs)
        ),
    },
}
# What a model's `compile` cannot call with targets and outputs.
OF_VALUES = ("Mean", "Sum")


def test_no_metric_is_forgotten():
    every = {
        name
        for name, value in vars(metrics).items()
        if isinstance(value, type) and issubclass(value, metrics.Metric)
    }
    named = {key.split(",")[0] for case in CASES.values() for key in case}
    # The base class has no result.
    assert every - named == {"Metric"}


def data(kind):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((ROWS, FEATURES)).astype("float32")
    ids = rng.integers(0, CLASSES, ROWS)
    y = {
        "numbers": rng.uniform(0.5, 2.0, (ROWS, CLASSES)).astype("float32"),
        "classes": np.eye(CLASSES, dtype="float32")[ids],
        "ids": ids.astype("int32"),
        "yes or no": (ids[:, None] > 0).astype("float32"),
    }
    return x, y[kind], rng.uniform(0.0, 2.0, ROWS).astype("float32")


class Reported(layers.Layer):
    """Reports to metrics of its own in its call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = metrics.Mean(name="layer_mean")
        self.sum = metrics.Sum(name="layer_sum")

    def call(self, x):
        self.mean.update_state(x)
        self.sum.update_state(x)
        return x


def make_model(kind):
    inputs = keras.Input((FEATURES,))
    activation, units = {
        "numbers": ("softplus", CLASSES),
        "yes or no": ("sigmoid", 1),
    }.get(kind, ("softmax", CLASSES))
    outputs = layers.Dense(units, activation)(inputs)
    model = keras.Model(inputs, Reported()(outputs))
    make = {k: v for k, v in CASES[kind].items() if k not in OF_VALUES}
    model.compile(
        keras.optimizers.SGD(0.1),
        "mse",
        metrics=[make(name=f"plain {key}") for key, make in make.items()],
        weighted_metrics=[
            make(name=f"weighted {key}") for key, make in make.items()
        ],
    )
    return model


@pytest.mark.parametrize("kind", CASES)
def test_every_metric(kind):
    x, y, weights = data(kind)
    if kind == "ids":
        y = y[:, None]

    def program(model):
        arguments = {"sample_weight": weights, "verbose": 0}
        return {
            "fit": model.fit(
                x, y, batch_size=BATCH, epochs=2, shuffle=False, **arguments
            ).history,
            "evaluate": model.evaluate(
                x, y, batch_size=BATCH, return_dict=True, **arguments
            ),
        }

    def run(distribution=None):
        return parity.run(program, lambda: make_model(kind), distribution)

    expected = run()
    for name in expected["said"]["evaluate"]:
        assert name in expected["said"]["fit"]
    distribution = keras.distribution.DataParallel()
    parity.assert_equal_on_all(kind, run(distribution), expected)


class OfLastBatch(metrics.Metric):
    """States that are aggregated in each way, but for the sum."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean, self.batches = [
            self.add_variable((), "zeros", aggregation=aggregation, name=name)
            for name, aggregation in (
                ("mean", "mean"),
                ("batches", "only_first_replica"),
            )
        ]

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.mean.assign(ops.mean(y_pred))
        self.batches.assign_add(1.0)

    def result(self):
        return {"of_last_mean": self.mean, "of_last_batches": self.batches}


def test_states_are_reduced_as_they_say():
    x, y, _ = data("numbers")

    def make_model():
        model = keras.Sequential([layers.Input((FEATURES,)), layers.Dense(3)])
        model.compile("sgd", "mse", metrics=[OfLastBatch(name="of_last")])
        return model

    def program(model):
        logs = model.evaluate(x, y, BATCH, verbose=0, return_dict=True)
        assert logs["of_last_batches"] == 3
        return logs

    distribution = keras.distribution.DataParallel()
    parity.assert_equal_on_all(
        "DataParallel",
        parity.run(program, make_model, distribution),
        parity.run(program, make_model),
    )


def test_one_collective_a_step(monkeypatch):
    x, y, _ = data("yes or no")
    calls = []
    all_reduce = dist.all_reduce
    with keras.distribution.DataParallel().scope():
        model = make_model("yes or no")
        model.evaluate(x, y, BATCH, verbose=0)
        monkeypatch.setattr(
            dist,
            "all_reduce",
            lambda *args, **kwargs: (
                calls.append(args) or all_reduce(*args, **kwargs)
            ),
        )
        model.evaluate(x, y, BATCH, verbose=0)
    # Three for the call and 3 of batches, for 35 metrics. What the host reads
    # goes by itself where the states lie on a GPU.
    assert len(calls) == (9 if torch.cuda.is_available() else 6)
