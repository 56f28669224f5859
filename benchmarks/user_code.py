"""What it costs that user code sees the global batch.

Trains, by `fit` under `DataParallel`, the GPT with its blocks written as a
composite layer, and the MLP with a loss function of one's own: as they are, and
as if they were on the list of known code, so that they run on local rows. Both
take turns in the same processes; a ratio is of two epochs of one round.

    python benchmarks/user_code.py --rounds 15
"""

import argparse
import statistics
import time

import processes
import workloads

VARIANTS = ("local rows", "global batch")


def worker(rank, report, name, rounds, steps):
    import keras_models
    import numpy as np

    import keras
    from keras import layers
    from keras import ops
    from keras.src.backend.torch.distribution.global_rows import known

    sizes = workloads.WORKLOADS[name]
    keras.distribution.set_distribution(keras_models.data_parallel())

    class Block(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first = layers.LayerNormalization(epsilon=1e-5)
            self.attention = keras_models.SelfAttention(
                sizes.width, sizes.heads
            )
            self.second = layers.LayerNormalization(epsilon=1e-5)
            self.up = layers.Dense(sizes.hidden, activation="gelu")
            self.down = layers.Dense(sizes.width)

        def call(self, x):
            x = x + self.attention(self.first(x))
            return x + self.down(self.up(self.second(x)))

    def squares(y, p):
        return ops.mean(ops.square(y - p))

    rng = np.random.default_rng(0)
    if isinstance(sizes, workloads.MLP):
        model = keras_models.make_mlp(sizes)
        x = rng.standard_normal((sizes.batch * steps, sizes.width))
        y = rng.standard_normal((sizes.batch * steps, sizes.output))
        x, y, loss = x.astype("float32"), y.astype("float32"), squares
    else:
        inputs = keras.Input((sizes.length,), dtype="int32")
        x = layers.Embedding(sizes.vocabulary, sizes.width)(inputs)
        x = keras_models.Positions()(x)
        for _ in range(sizes.blocks):
            x = Block()(x)
        x = layers.LayerNormalization(epsilon=1e-5)(x)
        model = keras.Model(inputs, layers.Dense(sizes.vocabulary)(x))
        shape = (sizes.batch * steps, sizes.length)
        x = rng.integers(0, sizes.vocabulary, shape)
        y = rng.integers(0, sizes.vocabulary, shape)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss)
    lists = known.lists()
    own = lists.layers, lists.functions
    more = {Block, keras_models.Positions, keras_models.SelfAttention}
    as_known = own[0] | more, own[1] | {squares}

    def epoch(variant):
        lists.layers, lists.functions = {
            "local rows": as_known,
            "global batch": own,
        }[variant]
        start = time.perf_counter()
        model.fit(x, y, batch_size=sizes.batch, verbose=0, shuffle=False)
        seconds = time.perf_counter() - start
        assert model.train_function.is_known == (variant == "local rows")
        return seconds / steps

    for variant in VARIANTS * 2:
        epoch(variant)
    for number in range(rounds):
        order = VARIANTS if number % 2 else VARIANTS[::-1]
        times = {variant: epoch(variant) for variant in order}
        if rank == 0:
            report(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--names", nargs="*", default=["mlp", "gpt"])
    arguments = parser.parse_args()
    print("| | ms a step, local rows | global batch | ratio (quartiles) |")
    print("| --- | --- | --- | --- |")
    for name in arguments.names:
        steps = 20 if "mlp" in name else 4
        rounds = list(processes.launch(worker, (name, arguments.rounds, steps)))
        ratios = sorted(r["global batch"] / r["local rows"] for r in rounds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        times = [
            f"{1000 * statistics.median(r[v] for r in rounds):.2f}"
            for v in VARIANTS
        ]
        row = [name, *times, f"{middle:.3f} ({low:.3f}-{high:.3f})"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
