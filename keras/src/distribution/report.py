"""What a layout costs, before it is paid."""

import json

from keras.src.api_export import keras_export
from keras.src.distribution import distribution_lib
from keras.src.distribution import layout_facts
from keras.src.distribution import processes
from keras.src.distribution import report_pictures
from keras.src.distribution import report_tables
from keras.src.distribution import report_text


@keras_export("keras.distribution.report")
def report(model, batch_size=None, x=None, y=None, distribution=None):
    """Tells what a distribution does with a model: memory and communication.

    A dry run: a model like this one is made under the distribution and trained
    for a few steps of the real code, in this process alone, which plays the
    first of as many as the mesh asks for. No launcher and no GPU is needed, nor
    the memory of more than one process. Counts and bytes are those that real
    processes on the host (gloo) have in their second steps and later: in the
    first ones they learn in which order to gather and reduce.

    ```python
    devices = [f"cpu:{i}" for i in range(8)]
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*up/kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    print(keras.distribution.report(make_model, 64, distribution=distribution))
    ```

    In a job of several processes it is an error, on whichever process calls
    it, at once and before anything is done: the command `python -m
    keras_torch_distribution report` takes a program as it is.

    Args:
        model: a function without arguments that makes a model, compiled as it
            is trained; or a model, which is made anew from its config. One that
            is not compiled is trained by Adam on the mean squared error.
        batch_size: int, rows of a global batch. It is made of ones.
        x: a global batch, where its shape is not known from the model.
        y: targets, where they are not those of one usual loss.
        distribution: `keras.distribution.Distribution`, of a mesh of any
            number of devices. Defaults to the one that is set.

    Returns:
        A `Report`. To print it gives at most 25 lines.

    Raises:
        RuntimeError: in a job of several processes.
    """
    if distribution is None:
        distribution = distribution_lib.distribution()
    if distribution is None:
        raise ValueError(
            "Pass `distribution`, or set one, to tell what it does with the "
            "model. Received: distribution=None"
        )
    made, seen = processes.dry_runs().of(model, distribution, batch_size, x, y)
    return of_recorded(made, distribution, seen)


class Report:
    """What a distribution does with a model.

    Args:
        facts: dict of what JSON knows: that of `layout_facts.of_model`, and
            what a dry run has seen ("collectives", "steady", "rows", "peak").
    """

    def __init__(self, facts):
        self.facts = facts

    def __str__(self):
        return report_text.summary(self.facts)

    __repr__ = __str__

    @property
    def totals(self):
        """Dict from collectives to their number and bytes in a step."""
        return report_tables.totals(self.facts["collectives"])

    def variables(self):
        """A table of all variables: a string."""
        return report_tables.variables(self.facts)

    def collectives(self):
        """A table of all collectives of a step, in their order: a string."""
        return report_tables.collectives(self.facts)

    def picture(self, path=None, dims=None):
        """Which process stores what, in boxes of text.

        Args:
            path: of a variable, or its end. None for all variables, a line for
                those that are alike.
            dims: pair of the dims to draw, down and to the right. Defaults to
                those that are cut.
        """
        return report_pictures.text(self.facts, path, dims)

    def svg(self, path=None, dims=None):
        """As `picture`, an SVG image: a string."""
        return report_pictures.svg(self.facts, path, dims)

    def diff(self, other):
        """What another report has otherwise: a string.

        Args:
            other: a `Report` of the same model.
        """
        return report_tables.difference(self.facts, other.facts)

    def to_json(self):
        """All facts: a string. `Report.from_json` takes it."""
        return json.dumps(self.facts)

    @classmethod
    def from_json(cls, text):
        return cls(json.loads(text))

    def _repr_html_(self):
        text = str(self).replace("&", "&amp;").replace("<", "&lt;")
        return f"<pre>{text}</pre>{self.svg()}"


def of_recorded(model, distribution, seen, optimizer=None):
    """A `Report` of a model, and of what was recorded of its training.

    Args:
        model: a built model or layer.
        distribution: that it was built under.
        seen: dict, as `processes.dry_runs().facts_of` gives it.
        optimizer: that updates it. Defaults to the model's own.
    """
    facts = layout_facts.of_model(model, distribution, optimizer)
    return Report({**facts, **seen})
