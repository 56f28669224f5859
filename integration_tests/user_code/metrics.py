"""Metrics of one's own: functions of targets and predictions, and classes."""

import numpy as np
import torch

from integration_tests.user_code.losses_of_pairs import in_batch_softmax
from integration_tests.user_code.running import note
from integration_tests.user_code.running import squares
from keras import metrics
from keras import ops


def function(f):
    """A metric of a function, made anew for each program."""
    return lambda: f


def ranks(x):
    return torch.argsort(torch.argsort(x))


FUNCTIONS = {
    "root": function(lambda y, p: ops.sqrt(ops.mean(squares(y, p)))),
    "sum": function(lambda y, p: ops.sum(squares(y, p))),
    "by a size": function(lambda y, p: squares(y, p).sum() / len(y)),
    "rows": function(lambda y, p: ops.max(squares(y, p), axis=-1)),
    "columns": function(lambda y, p: ops.max(squares(y, p), axis=0)),
    "a half": function(lambda y, p: squares(y, p)[: len(y) // 2 + 1].mean()),
    "a Python number": function(lambda y, p: float(ops.max(ops.abs(y - p)))),
    "a number of numpy": function(
        lambda y, p: np.median(np.abs((y - p).detach().cpu().numpy()))
    ),
    "an int": function(lambda y, p: torch.tensor(float(int((y > 0.1).sum())))),
    "contrast": function(in_batch_softmax),
    "rank correlation": function(
        lambda y, p: (ranks(y[:, 0]) * ranks(p[:, 0])).float().mean()
    ),
    "r2": function(
        lambda y, p: (
            1
            - squares(y, p).sum()
            / (0.1 + squares(y, ops.mean(y, axis=0)).sum())
        )
    ),
    "masked": function(
        lambda y, p: ops.sum(squares(y, p)[y > 0.1]) / (1 + ops.sum(y > 0.1))
    ),
    "loop": function(lambda y, p: sum(a @ b for a, b in zip(y, p)) / len(y)),
    "quantile": function(lambda y, p: torch.quantile(squares(y, p), 0.9)),
    "counted": function(lambda y, p: (note(len(y)), ops.std(p))[1]),
    "a random row": function(
        lambda y, p: squares(y, p)[torch.randint(len(y), ())]
    ),
}


class Own(metrics.Metric):
    """The base of metrics that are written by hand."""

    def __init__(self, name="own", **kwargs):
        super().__init__(name=name, **kwargs)
        self.reset_state()

    def reset_state(self):
        super().reset_state()
        self.seen = []

    def result(self):
        return np.mean(self.seen) if self.seen else 0.0


class OfList(Own):
    """The median of all predictions, kept in a list."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.append(ops.convert_to_numpy(y_pred))

    def result(self):
        if not self.seen:
            return 0.0
        return float(np.median(np.concatenate(self.seen)))


class OfTensors(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.append((y_true - y_pred).detach())

    def result(self):
        return torch.cat(self.seen).std() if self.seen else torch.zeros(())


class OfNumbers(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.extend(float(row.max()) for row in y_pred)


class OfWeights(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            sample_weight = ops.ones((len(y_true),))
        errors = ops.mean(squares(y_true, y_pred), axis=1)
        self.seen.append(float(ops.sum(errors * sample_weight)))


class Rows(Own):
    """Counts rows and batches in Python numbers."""

    def reset_state(self):
        super().reset_state()
        self.rows = self.batches = 0

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.rows += len(y_true)
        self.batches += 1
        note(self.rows)

    def result(self):
        return {"rows": self.rows, "batches": self.batches}


class OfVariables(metrics.Metric):
    """States that add up, are kept, and are counted."""

    def __init__(self, name="own"):
        super().__init__(name=name)
        self.total = self.add_variable((3,), "zeros", name="total")
        self.largest = self.add_variable((), "zeros", name="largest")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        errors = squares(y_true, y_pred)
        self.total.assign_add(ops.sum(errors, axis=0))
        self.largest.assign(ops.maximum(self.largest, ops.max(errors)))
        self.count.assign_add(ops.shape(y_true)[0])

    def result(self):
        mean = self.total / ops.maximum(self.count, 1.0)
        return {"mean": ops.max(mean), "largest": self.largest}


class MeanOfBatches(metrics.Metric):
    """The mean of what each batch says, whatever its size."""

    def __init__(self, name="own"):
        super().__init__(name=name)
        self.total = self.add_variable((), "zeros", name="total")
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(ops.std(y_true - y_pred))
        self.batches.assign_add(1)

    def result(self):
        return self.total / ops.maximum(self.batches, 1.0)


class Decaying(metrics.Metric):
    def __init__(self, name="own"):
        super().__init__(name=name)
        self.average = self.add_variable((3,), "zeros", name="average")

    def update_state(self, y_true, y_pred, sample_weight=None):
        mean = ops.mean(y_pred, axis=0)
        self.average.assign(0.9 * self.average + 0.1 * mean)

    def result(self):
        return ops.norm(self.average)


class Confusion(metrics.Metric):
    def __init__(self, name="own"):
        super().__init__(name=name)
        self.table = self.add_variable((3, 3), "zeros", name="table")

    def update_state(self, y_true, y_pred, sample_weight=None):
        pairs = torch.stack([y_true.argmax(-1), y_pred.argmax(-1)])
        for i, j in pairs.T.tolist():
            self.table.assign(ops.scatter_update(self.table, [[i, j]], [9.0]))
        ones = ops.one_hot(pairs[0] * 3 + pairs[1], 9)
        self.table.assign_add(ops.reshape(ops.sum(ones, axis=0), (3, 3)))

    def result(self):
        return ops.trace(self.table) + 0.1 * ops.sum(self.table)


class OwnAdded(metrics.Metric):
    """Says what a state is reduced by; on one device it is nothing."""

    def __init__(self, aggregation, name="own"):
        super().__init__(name=name)
        self.state = self.add_variable(
            (), "zeros", aggregation=aggregation, name="total"
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.state.assign(self.state * 0.5 + ops.max(squares(y_true, y_pred)))

    def result(self):
        return self.state


class OfMean(metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        errors = ops.mean(squares(y_true, y_pred), axis=-1)
        super().update_state(errors - ops.min(errors), sample_weight)


class OfNumber(metrics.Mean):
    """Weighs batches alike."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(ops.std(y_true - y_pred))


class OfSum(metrics.Sum):
    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(ops.std(y_pred, axis=0), None)

    def result(self):
        return ops.sqrt(ops.abs(super().result()))


class OfWrapper(metrics.MeanMetricWrapper):
    def __init__(self):
        super().__init__(lambda y, p: ops.abs(y - p).max(-1).values, name="own")

    def update_state(self, y_true, y_pred, sample_weight=None):
        centred = y_pred - ops.mean(y_pred, axis=0)
        return super().update_state(y_true, centred, sample_weight)


class OfKeras(metrics.MeanSquaredError):
    def result(self):
        return ops.log1p(super().result())


class InnerMetrics(metrics.Metric):
    def __init__(self):
        super().__init__(name="own")
        self.inner = [metrics.MeanAbsoluteError(), metrics.Mean()]

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.inner[0].update_state(y_true, y_pred, sample_weight)
        self.inner[1].update_state(ops.var(y_pred))

    def result(self):
        return self.inner[0].result() * self.inner[1].result()

    def reset_state(self):
        for metric in self.inner:
            metric.reset_state()


CLASSES = {
    cls.__name__: cls
    for cls in (
        OfList,
        OfTensors,
        OfNumbers,
        OfWeights,
        Rows,
        OfVariables,
        MeanOfBatches,
        Decaying,
        Confusion,
        OfMean,
        OfNumber,
        OfSum,
        OfWrapper,
        OfKeras,
        InnerMetrics,
    )
} | {
    f"aggregated by {name}": lambda name=name: OwnAdded(name)
    for name in ("none", "sum", "mean", "only_first_replica")
}


def wrapper(f):
    return lambda: metrics.MeanMetricWrapper(f, name="own")


WEIGHTED = {
    "wrapper of rows": wrapper(lambda y, p: ops.mean(squares(y, p), axis=-1)),
    "wrapper of entries": wrapper(squares),
    "wrapper of centred": wrapper(
        lambda y, p: ops.mean(squares(y, p - ops.mean(p, axis=0)), axis=-1)
    ),
    "weights": OfWeights,
    "mean": OfMean,
    "wrapper": OfWrapper,
    "inner": InnerMetrics,
    "of Keras": OfKeras,
}
