"""A report that is asked for in a real job is an error, and nothing else."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras.src.backend.common import global_state

pytestmark = pytest.mark.world(2)


def state(model):
    """What a dry run might change, as text that can be compared."""
    variables = [*model.variables, *model.optimizer.variables]
    sums = [float(np.sum(np.asarray(v.numpy()))) for v in variables]
    draws = torch.get_rng_state().sum().item(), np.random.get_state()[1][:3]
    names = global_state.get_global_attribute("object_name_uids", {})
    return repr((sums, draws, sorted(names.items())))


def check(model):
    """All call it, and then each alone, without a collective.

    Collective: every process calls it.
    """
    from keras.src.backend.torch.distribution.report import collectives

    def report():
        keras.distribution.report(model, 4)

    before = state(model)
    for caller in (None, 0, 1):
        said = "not called"
        with collectives.CollectiveCounter() as counter:
            if caller in (None, dist.get_rank()):
                with pytest.raises(RuntimeError) as error:
                    report()
                said = str(error.value)
        assert not counter.calls
        said = everyone.gather(said)
        for rank, text in enumerate(said):
            if caller in (None, rank):
                assert f"on process {rank} of 2" in text
                assert "report train.py --processes 2" in text
    assert state(model) == before


def test_before_and_after_a_training():
    x = np.ones((4, 6), "float32")
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
    layout_map = parity.layout_map(mesh, {".*up/kernel": (None, "model")})
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    with parity.fresh(distribution, 3):
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(8, name="up")]
        )
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        check(model)
        first = model.fit(x, np.ones((4, 8)), verbose=0).history["loss"]
        check(model)
        second = model.fit(x, np.ones((4, 8)), verbose=0).history["loss"]
        assert second < first
