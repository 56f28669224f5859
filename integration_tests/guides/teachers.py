"""Students that learn from teachers, and rows that are mixed."""

import torch

import keras
from integration_tests.guides.guide import images
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops


def classifier(units, name):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(units, "relu"), layers.Dense(3)],
        name=name,
    )


class Distiller(keras.Model):
    """A loss of labels and one of the teacher's softened answers."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.built = True

    def compile(self, optimizer, metrics, alpha=0.3, temperature=3.0):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
        self.distillation_loss = keras.losses.KLDivergence()
        self.alpha = alpha
        self.temperature = temperature

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        with torch.no_grad():
            answers = self.teacher(x, training=False)
        soft = self.distillation_loss(
            ops.softmax(answers / self.temperature, axis=1),
            ops.softmax(y_pred / self.temperature, axis=1),
        )
        hard = self.student_loss(y, y_pred)
        return self.alpha * hard + (1 - self.alpha) * soft * (
            self.temperature**2
        )

    def call(self, x):
        return self.student(x)


@program
def distillation():
    x, y = normal(11, 6), integers(3, 11)
    teacher = classifier(12, "teacher")
    teacher.compile(
        sgd(0.2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    taught = teacher.fit(x, y, batch_size=4, verbose=0)
    teacher.trainable = False
    model = Distiller(classifier(4, "student"), teacher)
    model.compile(sgd(0.1), [keras.metrics.SparseCategoricalAccuracy()])
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        taught=taught.history,
        evaluated=model.evaluate(x, y, batch_size=4, verbose=0),
    )


class MeanTeacher(keras.callbacks.Callback):
    """Moves the teacher after each batch, and writes down how far."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.distances = []

    def on_train_batch_end(self, batch, logs=None):
        distance = 0.0
        for slow, fast in zip(self.teacher.weights, self.student.weights):
            slow.assign(0.8 * slow + 0.2 * fast)
            distance += float(ops.sum(ops.square(slow - fast)))
        self.distances.append(distance)


class Consistent(keras.Model):
    """Noisy rows should be answered as the teacher answers clean ones."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.seeds = keras.random.SeedGenerator(8)

    def call(self, x):
        return self.student(x)

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        noise = 0.1 * keras.random.normal(x.shape, seed=self.seeds)
        guess = self.student(x + noise, training=True)
        wanted = self.teacher(x, training=False).detach()
        loss = self.compute_loss(y=y, y_pred=guess)
        loss = loss + 0.5 * ops.mean(
            ops.square(ops.softmax(guess) - ops.softmax(wanted))
        )
        loss.backward()
        trained = self.student.trainable_weights
        gradients = [v.value.grad for v in trained]
        with torch.no_grad():
            self.optimizer.apply(gradients, trained)
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(x, y, guess)


@program
def mean_teacher():
    student, teacher = classifier(6, "student"), classifier(6, "teacher")
    teacher.set_weights(student.get_weights())
    model = Consistent(student, teacher)
    model.compile(
        sgd(0.2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    mover = MeanTeacher(student, teacher)
    history = model.fit(
        normal(9, 6),
        integers(3, 9),
        batch_size=4,
        epochs=2,
        callbacks=[mover],
        verbose=0,
    )
    return report(history, model, distances=mover.distances)


class RandomErasing(layers.Layer):
    """Overwrites one rectangle, the same one in all rows of a batch."""

    def __init__(self, side, **kwargs):
        super().__init__(**kwargs)
        self.side = side
        self.seeds = keras.random.SeedGenerator(6)

    def call(self, x, training=False):
        if not training:
            return x
        high = x.shape[1] - self.side
        top = int(keras.random.randint((), 0, high, seed=self.seeds))
        left = int(keras.random.randint((), 0, high, seed=self.seeds))
        keep = torch.ones(x.shape[1:3])
        keep[top : top + self.side, left : left + self.side] = 0.0
        noise = keras.random.uniform(ops.shape(x), seed=self.seeds)
        keep = keep[None, :, :, None]
        return keep * x + (1.0 - keep) * noise


def small_cnn():
    return [
        layers.Conv2D(4, 3, strides=2, activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3, "softmax"),
    ]


class Mixup(keras.Sequential):
    """Each row with another one, by a share drawn for each."""

    def train_step(self, data):
        x, y = data
        n = ops.shape(x)[0]
        share = keras.random.beta((n,), 0.4, 0.4, seed=self.seeds)
        order = keras.random.shuffle(ops.arange(n), seed=self.seeds)
        share_x = ops.reshape(share, (n, 1, 1, 1))
        x = share_x * x + (1 - share_x) * ops.take(x, order, axis=0)
        share_y = ops.reshape(share, (n, 1))
        y = share_y * y + (1 - share_y) * ops.take(y, order, axis=0)
        return super().train_step((x, y))


@program
def mixup_and_erasing():
    model = Mixup([keras.Input((8, 8, 1)), RandomErasing(3), *small_cnn()])
    model.seeds = keras.random.SeedGenerator(4)
    model.compile(sgd(0.3), "categorical_crossentropy", metrics=["accuracy"])
    x = images(11)
    y = keras.utils.to_categorical(integers(3, 11), 3)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, evaluated=model.evaluate(x, y, batch_size=5, verbose=0)
    )


class Cutmix(keras.Sequential):
    """A rectangle of another row, put in by a mask."""

    def train_step(self, data):
        x, y = data
        n = x.shape[0]
        order = torch.randperm(n)
        top, left = (int(v) for v in torch.randint(0, 5, (2,)))
        down = (torch.arange(8) >= top) & (torch.arange(8) < top + 4)
        right = (torch.arange(8) >= left) & (torch.arange(8) < left + 4)
        inside = (down[:, None] & right[None, :])[None, :, :, None]
        x = torch.where(inside, x[order], x)
        share = inside.float().mean()
        y = (1 - share) * y + share * y[order]
        logs = super().train_step((x, y))
        return {**logs, "share": share}


@program
def cutmix():
    model = Cutmix([keras.Input((8, 8, 1)), *small_cnn()])
    model.compile(sgd(0.3), "categorical_crossentropy")
    keras.utils.set_random_seed(17)
    x = images(9)
    y = keras.utils.to_categorical(integers(3, 9), 3)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(history, model)
