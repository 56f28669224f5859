"""The report of a layout says what real processes do: the same, not near."""

import collections
import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from integration_tests.harness.process_set import ROOT
from integration_tests.report import programs

pytestmark = pytest.mark.world(4)

HAS_HUB = importlib.util.find_spec("keras_hub") is not None
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


# The others take half a minute more: REPORT_ALL=1.
NAMES = [*programs.PROGRAMS, *programs.HUB]
if not os.environ.get("REPORT_ALL"):
    NAMES = [
        "gpt, FSDP",
        "gpt, sequence parallel",
        "convolutions",
        "qwen_moe",
    ]


@functools.cache
def predictions():
    """What one process alone predicts, of all programs."""
    names = [name for name in NAMES if HAS_HUB or name not in programs.HUB]
    command = [sys.executable, "-m", programs.__name__, "4", *names]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    return json.loads(
        subprocess.run(
            command, env=environment, cwd=ROOT, stdout=-1, check=True
        ).stdout
    )


def measure(name):
    """Collectives of one later step, by two ways to count, and bytes stored.

    Collective: every process calls it.
    """
    from keras.src.backend.torch.distribution.report import collectives
    from keras.src.backend.torch.distribution.report.recorder import Recorder

    make, (x, y), shape, layouts = programs.program(name)
    devices = keras.distribution.list_devices()
    distribution = programs.distribution(shape, layouts, devices)
    with parity.fresh(distribution, 7):
        model = make()
        steps = model.optimizer.gradient_accumulation_steps or 1
        for _ in range(3 * steps):
            model.train_on_batch(x, y)
        with collectives.CollectiveCounter() as counter:
            for _ in range(steps):
                model.train_on_batch(x, y)
        with Recorder() as recorder:
            # The first one tells it the names of weights, and memory is seen
            # from the third on.
            for _ in range(4):
                for _ in range(steps):
                    model.train_on_batch(x, y)
                recorder.cut()
        stored = sum(
            getattr(v._value, "_local_tensor", v._value).nbytes
            for v in model.variables
        )
        slots = sum(
            getattr(v._value, "_local_tensor", v._value).nbytes
            for v in model.optimizer.variables
        )
    return (
        dict(counter.calls),
        dict(counter.bytes),
        recorder.steps[1],
        (stored, slots, recorder.peak),
    )


@pytest.mark.parametrize("name", NAMES)
def test_prediction(name):
    if name in programs.HUB:
        pytest.importorskip("keras_hub", reason="see requirements-hub.txt")
    calls, carried, listed, stored = measure(name)
    facts = None
    if dist.get_rank() == 0:
        facts = predictions()[name]
    facts = everyone.gather(facts)[0]
    predicted = facts["collectives"]
    assert facts["steady"] and predicted
    assert collections.Counter(c["op"] for c in predicted) == calls
    # Shards of other processes may be smaller.
    if dist.get_rank() == 0:
        found = collections.Counter()
        for c in predicted:
            found[c["op"]] += c["bytes"]
        assert found == carried
        assert predicted == listed
        weights = sum(v["stored"] for v in facts["variables"])
        assert (weights, facts["slots"]["stored"]) == stored[:2]
        # To the byte in all but one, which is 6 KiB off.
        assert abs(facts["peak"] - stored[2]) <= 0.05 * stored[2] + 4096
