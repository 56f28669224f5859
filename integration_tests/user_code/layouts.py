"""The distributions that programs of user code run under."""

import keras
from integration_tests.harness import parity

TENSOR_PARALLEL = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*out/kernel": ("model", None),
    ".*inner/kernel": (None, "model"),
    ".*(scale|state)": ("model",),
    ".*kept": ("model", None),
}
FULLY_SHARDED = {
    ".*(up|out|inner)/kernel": ("batch", None),
    "(?!.*(query|key|value|_cell)/bias).*(bias|scale|state)": ("batch",),
    ".*kept": ("batch", None),
}
BOTH = {
    ".*up/kernel": ("batch", "model"),
    ".*up/bias": ("model",),
    ".*out/kernel": ("model", "batch"),
    ".*out/bias": ("batch",),
    ".*inner/kernel": ("model", "batch"),
    ".*(scale|state)": ("model",),
    ".*kept": ("model", None),
}
# By the number of processes.
DISTRIBUTIONS = {
    2: {
        "data parallel": keras.distribution.DataParallel,
        "tensor parallel": lambda: parity.model_parallel(
            (1, 2), TENSOR_PARALLEL
        ),
        "fully sharded": lambda: parity.model_parallel(
            (2,), FULLY_SHARDED, ("batch",)
        ),
    },
    4: {"both": lambda: parity.model_parallel((2, 2), BOTH)},
}
