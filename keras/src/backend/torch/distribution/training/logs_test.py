import functools
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from keras.src import backend
from keras.src import metrics as metrics_lib
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.training import logs
from keras.src.backend.torch.distribution.training import metric_states

WORLD = 3


def make_context(rank, size=WORLD):
    return types.SimpleNamespace(
        data_size=size, data_index=rank, data_group=dist.group.WORLD
    )


def reduce_logs(metrics, *args):
    reduction = logs.reduce_logs(
        metrics, metric_states.states_of(metrics, list), *args
    )
    return reduction.logs(), reduction.flags


def batch(total):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, size=(total, 1)).astype("float32")
    y_pred = generator.uniform(size=(total, 1)).astype("float32")
    return y, y_pred, generator.uniform(size=total).astype("float32")


METRICS = [
    metrics_lib.MeanSquaredError,
    metrics_lib.BinaryAccuracy,
    metrics_lib.AUC,
    metrics_lib.Precision,
    metrics_lib.R2Score,
    functools.partial(metrics_lib.F1Score, threshold=0.5),
    metrics_lib.RootMeanSquaredError,
]


@pytest.mark.parametrize("make_metric", METRICS)
@pytest.mark.parametrize("total", [9, 7, 2])
def test_metrics_are_those_of_all_rows(on_threads, make_metric, total):
    y, y_pred, weights = batch(total)
    metric = make_metric(name="metric")
    metric.update_state(y, y_pred, sample_weight=weights)
    expected = float(backend.convert_to_numpy(metric.result()).sum())

    def run(rank):
        start, stop = rows.split(total, WORLD, rank)
        metric = make_metric(name="metric")
        metric.update_state(
            y[start:stop],
            y_pred[start:stop],
            sample_weight=weights[start:stop],
        )
        local = [backend.convert_to_numpy(v) for v in metric.variables]
        with rows.current_rows(rows.split_evenly(total, WORLD, rank)):
            reduced, stopped = reduce_logs(
                [metric], {"metric": None}, [0.0], make_context(rank)
            )
        # The state stays local, and is reduced anew after the next step.
        for v, before in zip(metric.variables, local):
            np.testing.assert_array_equal(backend.convert_to_numpy(v), before)
        assert stopped == [0.0]
        return float(backend.convert_to_numpy(reduced["metric"]).sum())

    for actual in on_threads(WORLD, run):
        assert actual == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_other_values_are_means_over_rows(on_threads):
    def run(rank):
        with rows.current_rows(rows.Rows((2, 1, 1), rank)):
            return reduce_logs(
                [],
                {
                    "loss": torch.tensor(float(rank)),
                    "number": 4 * rank,
                    "vector": torch.tensor([[1.0, rank]]),
                    "text": f"{rank}",
                },
                [0.0],
                make_context(rank),
            )[0]

    for rank, reduced in enumerate(on_threads(WORLD, run)):
        assert list(reduced) == ["loss", "number", "vector", "text"]
        assert float(reduced["loss"]) == 0.75
        assert float(reduced["number"]) == 3.0
        assert reduced["vector"].tolist() == [[1.0, 0.75]]
        assert reduced["text"] == str(rank)


@pytest.mark.parametrize("flags", [(0, 0, 0), (0, 1, 0), (1, 1, 1)])
@pytest.mark.parametrize("data_size", [WORLD, 1])
def test_flags_are_added_up(on_threads, flags, data_size):
    def run(rank):
        return reduce_logs(
            [],
            {"loss": torch.tensor(1.0)},
            [float(flags[rank]), 2.0**40 + rank],
            make_context(rank, data_size),
        )[1]

    sums = [float(sum(flags)), WORLD * 2.0**40 + 3]
    assert on_threads(WORLD, run) == [sums] * WORLD
    assert (
        on_threads(WORLD, lambda rank: together.any_process(flags[rank]))
        == [any(flags)] * WORLD
    )


def test_processes_of_a_data_shard_count_once(on_threads):
    # Two data shards of two processes each.
    def run(rank):
        context = make_context(rank // 2, size=2)
        metric = metrics_lib.Sum(name="sum")
        metric.update_state([1.0, 10.0][rank // 2])
        return reduce_logs(
            [metric],
            {"sum": None, "loss": torch.tensor([2.0, 4.0][rank // 2])},
            [0.0],
            context,
        )[0]

    for reduced in on_threads(4, run):
        assert float(reduced["sum"]) == 11.0
        assert float(reduced["loss"]) == 3.0


@pytest.mark.parametrize(
    "aggregation, expected",
    # mean: 1 * 2/4 + 2 * 1/4 + 4 * 1/4
    [("sum", 7.0), ("mean", 2.0), ("only_first_replica", 1.0)],
)
def test_state_is_reduced_as_its_variable_says(
    on_threads, aggregation, expected
):
    class Own(metrics_lib.Metric):
        def __init__(self):
            super().__init__(name="own")
            self.total = self.add_variable(
                shape=(),
                initializer="ones",
                name="total",
                aggregation=aggregation,
            )

        def result(self):
            return self.total.value

    def run(rank):
        metric = Own()
        metric.total.assign(float(2**rank))
        with rows.current_rows(rows.Rows((2, 1, 1), rank)):
            return reduce_logs(
                [metric], {"own": None}, [0.0], make_context(rank)
            )[0]["own"]

    for value in on_threads(WORLD, run):
        assert float(value) == expected


def test_counters_stay_integers(on_threads):
    class Count(metrics_lib.Metric):
        def __init__(self):
            super().__init__(name="count")
            self.count = self.add_variable(
                shape=(), initializer="zeros", name="count", dtype="int32"
            )

        def result(self):
            return self.count.value

    def run(rank):
        metric = Count()
        metric.count.assign(2**24 + rank)
        return reduce_logs(
            [metric], {"count": None}, [0.0], make_context(rank)
        )[0]["count"]

    for value in on_threads(WORLD, run):
        assert value.dtype == torch.int32
        assert int(value) == 3 * 2**24 + 3
