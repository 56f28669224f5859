"""Where `fit` is in its data, and how it comes back there.

An iterator over data is made anew from the random states that held when it was
made, and gives the batches again that were trained on: they are read and left.
So the batches that follow, shuffled or drawn, are those of an undisturbed run,
whatever the source, as long as it draws from the generators of `torch`,
`numpy` and `random` or from that of a `DataLoader`, or begins alike each time
that it is iterated over.
"""

import contextlib

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.training import random_states


@contextlib.contextmanager
def of_fit(model):
    """Within it, a model is trained by `fit`."""
    before = of(model)
    model.__dict__[marks.POSITION] = Position()
    try:
        yield
    finally:
        del model.__dict__[marks.POSITION]
        if before is not None:
            model.__dict__[marks.POSITION] = before


def of(model):
    """The `Position` of the `fit` of a model, None where there is none."""
    return model.__dict__.get(marks.POSITION)


def follow(model, position):
    """To be called with each iterator of a model: that of `fit` comes first,
    before those of its evaluations."""
    here = of(model)
    if here is not None and not here.is_followed:
        position.is_followed = True
        model.__dict__[marks.POSITION] = position


class Position:
    """Where the iterator of a `fit` is.

    Attributes:
        is_followed: whether it is the iterator of `fit`.
        is_made_anew: whether each epoch has an iterator of its own.
        began: the random states when the iterator was made, None without one.
        taken: int, how many batches the iterator has given.
        resume: what `tell` gave, until the next iterator has come there.
        steps: int, how many of the current epoch were left out.
        generators: list of torch's generators that the data is drawn by.
    """

    def __init__(self):
        self.generators = []
        self.is_followed = self.is_made_anew = False
        self.began, self.taken = None, 0
        self.resume, self.steps = None, 0
        self._seen = 0

    def tell(self, batch):
        """Where it is, of which JSON is made.

        Args:
            batch: int, how many steps of the epoch are done; 0 between epochs.
        """
        now = self._states()
        if self.is_made_anew and not batch:
            return {"batch": 0, "taken": 0, "began": None, "now": now}
        return {
            "batch": batch,
            "taken": self.taken,
            "began": self.began,
            "now": now,
        }

    def leave_out(self, epochs):
        """Leaves out those steps of an epoch that are done.

        Args:
            epochs: the `EpochIterator`, whose epoch begins.
        """
        self.steps = 0
        if self.resume is None:
            return
        self.steps, seen = self.resume["batch"], self.resume["taken"]
        for _ in range(self.steps):
            if next(epochs._epoch_iterator, None) is None:
                self._raise_ended(self.steps)
        # Of the epochs before, if one iterator serves all.
        self._seen = seen - self.steps
        if self.steps:
            epochs._steps_seen += self.pop_seen()

    def pop_seen(self):
        """How many batches the iterator gave before those that are counted."""
        seen, self._seen = self._seen, 0
        return seen

    def follow(self, make_iterable):
        """An iterator over what a function makes, that is followed."""
        resume, self.resume = self.resume, None
        if resume is not None and resume["began"] is None:
            # An epoch begins. Of the other states, those that hold now.
            self._set_generators(resume["now"])
            resume = None
        if resume is None:
            self.began, self.taken = self._states(), 0
            return _Followed(self, iter(make_iterable()))
        now = random_states.get()
        random_states.set(resume["began"])
        self._set_generators(resume["began"])
        self.began, self.taken = resume["began"], 0
        iterator = _Followed(self, iter(make_iterable()))
        for _ in range(resume["taken"]):
            if next(iterator, None) is None:
                self._raise_ended(resume["taken"])
        # Between epochs others may have drawn, as they did before.
        random_states.set(resume["now"] if resume["batch"] else now)
        return iterator

    def _states(self):
        states = random_states.get()
        states["generators"] = [
            random_states.as_text(generator.get_state())
            for generator in self.generators
        ]
        return states

    def _set_generators(self, states):
        for generator, text in zip(self.generators, states["generators"]):
            generator.set_state(random_states.from_text(text))

    def _raise_ended(self, count):
        raise ValueError(
            "The data of `fit` ends before the place where it goes on from a "
            f"checkpoint: after {self.taken} batches, of which {count} were "
            "trained on. Pass the data that the checkpoint was made with, or "
            "`restore=False`."
        )


class _Followed:
    def __init__(self, position, iterator):
        self.position, self.iterator = position, iterator

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.iterator)
        self.position.taken += 1
        return batch
