"""The report of a layout that is found, of a program that need have none.

The program is run twice: as it is, to see its model and what it is trained on
(under a distribution that cuts nothing, if it sets none), and under the layout
that was found for that model, whatever distribution it sets.
"""

import contextlib
import math
import warnings

from keras_torch_distribution import report as report_lib

# Of a mesh for a program that has none.
NAMES = ("batch", "model", "model_2", "model_3")


def run(options, processes):
    """The report of the layout that is found, and its program.

    Args:
        options: what `report.add_arguments` describes.
        processes: int.

    Returns:
        Tuple of a `Report` and a string.

    Raises:
        report.Nothing: if there is nothing to report.
    """
    from keras.src.distribution import distribution_lib as lib

    shape = options.mesh or (1, processes)
    if len(shape) > len(NAMES):
        raise report_lib.Nothing(
            f"A mesh has {len(NAMES)} axes at most here. Received: --mesh "
            f"with {len(shape)}"
        )
    devices = [f"cpu:{i}" for i in range(processes)]
    default = lib.DeviceMesh(shape, NAMES[: len(shape)], devices)

    def parallel(layout_map, batch):
        return lib.ModelParallel(layout_map=layout_map, batch_dim_name=batch)

    @contextlib.contextmanager
    def own_or_none():
        lib.set_distribution(parallel(lib.LayoutMap(default), NAMES[0]))
        yield

    seen = report_lib.run(options, processes, own_or_none)
    mesh, batch = default, (NAMES[0],)
    own = seen.distribution
    if len(own.device_mesh.shape) == len(shape) or not options.mesh:
        mesh, batch = own.device_mesh, own.batch_axis_names
    sizes = dict(zip(mesh.axis_names, map(int, mesh.shape)))
    if options.budget is None and all(
        n in batch or size == 1 for n, size in sizes.items()
    ):
        raise report_lib.Nothing(
            f"All axes of the mesh {sizes} split batches or have one process, "
            "so none cuts weights. Pass --mesh 2,4 for one that does, or "
            "--budget for weights to be cut by the data axis (FSDP)."
        )
    with warnings.catch_warnings():
        # Its text says it too.
        warnings.filterwarnings("ignore", "LayoutMap.auto")
        try:
            found = lib.LayoutMap.auto(
                seen.model,
                mesh,
                budget=options.budget and options.budget * 2**30,
                x=seen.inputs,
                batch_dim_name=batch,
            )
        except ValueError as error:
            raise report_lib.Nothing(str(error)) from error

    @contextlib.contextmanager
    def as_found():
        distribution = parallel(found, batch if batch[1:] else batch[0])
        with _instead_of_its_own(distribution):
            lib.set_distribution(distribution)
            yield

    report = report_lib.run(options, processes, as_found).report
    text = [_code(mesh, found, batch), "", found.explanation]
    if getattr(own, "_layout_map", None):
        text.append(_beside_its_own(options, seen.report, report))
    return report, "\n".join(text)


def _instead_of_its_own(distribution):
    """Within it, whatever distribution is set, it is this one."""
    from keras.src.backend.torch import distribution_lib as backend_lib
    from keras.src.backend.torch.distribution import modes
    from keras_torch_distribution.src.distribution import distribution_lib

    def this(function):
        return lambda value: function(value and distribution)

    return modes.swapped(
        [
            (where, name, this(getattr(where, name)))
            for where, name in (
                (distribution_lib, "released_set_distribution"),
                (backend_lib, "distribution_was_set"),
            )
        ]
    )


def _code(mesh, found, batch):
    """A program that sets such a distribution."""
    shape = tuple(int(n) for n in mesh.shape)
    names = ", ".join(f'"{n}"' for n in mesh.axis_names)
    names_of_batch = ", ".join(f'"{n}"' for n in batch)
    if batch[1:]:
        names_of_batch = f"({names_of_batch})"
    return (
        "# Before the model is made, on "
        f"{math.prod(shape)} processes:\n"
        "keras.distribution.initialize()\n"
        f"mesh = keras.distribution.DeviceMesh({shape}, [{names}])\n"
        f"{found.code}\n"
        "keras.distribution.set_distribution(\n"
        "    keras.distribution.ModelParallel(\n"
        f"        layout_map=layout_map, batch_dim_name={names_of_batch}\n"
        "    )\n"
        ")"
    )


def _beside_its_own(options, own, found):
    from keras.src.distribution.report_tables import size_of

    def costs(report):
        facts = report.facts
        held = sum(v["stored"] for v in facts["variables"])
        sent = sum(c["sent"] for c in facts["collectives"])
        return (
            f"holds {size_of(held)} of weights and sends {size_of(sent)} a step"
        )

    text = (
        f"by the layout map of {options.script} a process {costs(own)}, by "
        f"the one that is found it {costs(found)}"
    )
    return f"{text}\n\n{own.diff(found)}" if options.all else text
