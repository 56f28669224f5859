"""The texts and pictures of a layout report, of facts written by hand."""

import pytest

from keras.src.distribution import layout_advice
from keras.src.distribution import layout_facts
from keras.src.distribution.report import Report

MESH = {"axes": ["batch", "model"], "shape": [2, 2], "batch": ["batch"]}


def variable(path, shape, axes, roles, key=None, trainable=True):
    sizes = dict(zip(MESH["axes"], MESH["shape"]))
    stored = list(shape)
    for dim, names in enumerate(axes):
        for name in names or ():
            stored[dim] = -(-stored[dim] // sizes[name])

    def size(dims):
        count = 4
        for n in dims:
            count *= n
        return count

    return {
        "path": path,
        "shape": list(shape),
        "stored_shape": stored,
        "dtype": "float32",
        "trainable": trainable,
        "key": key,
        "axes": list(axes),
        "roles": list(roles),
        "bytes": size(shape),
        "stored": size(stored),
    }


def collective(op, layer, direction, size, reason="activations", axes="model"):
    return {
        "op": op,
        "axes": axes,
        "for": reason,
        "layer": layer,
        "direction": direction,
        "shapes": [[size // 4]],
        "dtype": "float32",
        "bytes": size,
        "sent": size,
    }


def facts(**changed):
    projections = [
        variable(
            f"block_{i}/{name}/kernel",
            (8, 4, 2),
            [["model"], None, None],
            ["in", "out", "out"],
            ".*(query|key)/kernel",
        )
        for i in range(2)
        for name in ("query", "key")
    ]
    return {
        "mesh": MESH,
        "variables": [
            *projections,
            variable(
                "up/kernel", (8, 64), [["batch"], ["model"]], ["in", "out"], "u"
            ),
            variable("head/kernel", (64, 500), [None, None], ["in", "out"]),
            variable("scale", (), [], [], trainable=False),
        ],
        "slots": {"optimizer": "Adam", "bytes": 8192, "stored": 2048},
        "keys": {
            ".*(query|key)/kernel": ["model", None, None],
            "u": ["batch", "model"],
            ".*hed/kernel": [None, "model"],
            "y/output": [None],
        },
        "outputs": {"y/output": "y/output"},
        "collectives": [
            collective(op, f"block_{i}/{name}", direction, 1024)
            for i in range(2)
            for name in ("query", "key")
            for op, direction in (
                ("all_reduce", "forward"),
                ("all_gather", "backward"),
            )
        ]
        + [collective("all_gather", "up", "forward", 512, "weights", "batch")],
        "steady": True,
        "rows": 6,
        "peak": 2**20,
        **changed,
    }


def test_summary():
    text = str(Report(facts()))
    assert len(text.splitlines()) <= 25
    for words in (
        "mesh batch 2 x model 2 = 4 processes; a batch of 6 rows",
        ".*(query|key)/kernel  row over model",
        "column over model, FSDP over batch",
        ".*hed/kernel  matches nothing; nearest: head/kernel",
        "whole: head/kernel (64, 500) 125.0 KiB, would be 62.5 KiB as "
        "(None, 'model')",
        "block_*/query",
        "2 all-reduce model 2.0 KiB",
        "weights cut over batch (FSDP)",
        "= 9 collectives, 8.5 KiB a process: 5 all-gather, 4 all-reduce",
        "advice: block_*/query/kernel and block_*/key/kernel: cut on the dim "
        "that is summed over, of a whole input: 4 all-reduces forward, 4 "
        "all-gathers backward. (None, 'model', None) cuts the outputs",
    ):
        assert words in text, words
    assert "y/output" not in text
    assert Report.from_json(Report(facts()).to_json()).facts == facts()
    assert Report(facts()).totals["all_reduce"] == [4, 4096]
    first = collective("all_reduce", "block/query", "forward", 1024)
    listed = [first, *facts()["collectives"]]
    text = str(Report(facts(collectives=listed)))
    assert "3 all-reduce model 3.0 KiB" in text and "block/query" not in text
    text = str(Report(facts(collectives=[], steady=False)))
    assert "a step communicates nothing" in text and "advice" not in text


def test_many_keys_and_groups_stay_short():
    variables = [
        variable(f"v{chr(97 + i)}/kernel", (64, 64), [None, None], [None] * 2)
        for i in range(20)
    ]
    for i, v in enumerate(variables[:15]):
        v["key"] = f"v{i}"
    listed = [
        collective("all_reduce", f"v{chr(97 + i)}", "forward", 4 * i)
        for i in range(20)
    ]
    report = Report(facts(variables=variables, collectives=listed))
    assert len(str(report).splitlines()) <= 25
    assert "(10 more keys)" in str(report)
    assert "(14 more groups)" in str(report)
    assert len(report.variables().splitlines()) == 21
    assert len(report.collectives().splitlines()) == 21


def advice(v, listed, **changed):
    return "\n".join(
        layout_advice.of(facts(variables=[v], collectives=listed, **changed))
    )


def test_advice():
    gathered = [collective("all_gather", "a", "forward", 4096)]
    uneven = variable("a/kernel", (8, 5), [None, ["model"]], ["in", "out"])
    said = advice(uneven, gathered)
    assert "model (2) does not divide dim 1 of (8, 5)" in said
    width = variable(
        "e/embeddings", (8, 4), [None, ["model"]], ["vocabulary", "width"]
    )
    said = advice(width, gathered)
    assert "gathered by a. ('model', None) cuts the vocabulary" in said
    whole = variable("a/kernel", (8, 4), [None, None], ["in", "out"])
    said = advice(whole, gathered, outputs={".*a.*": "a/output"})
    assert "'.*a.*' matches 'a/output' too" in said
    logits = [collective("all_gather", None, "forward", 4096, "others")]
    assert "it stays cut" in advice(whole, logits)
    assert not advice(whole, gathered)
    # The data axis cuts the dim that the model axis leaves.
    both = variable(
        "q/kernel", (8, 4), [["model"], ["batch"]], ["in", "out"], "k"
    )
    row = [
        collective("all_reduce", "q", "forward", 4096),
        collective("all_gather", "q", "backward", 4096),
    ]
    assert "('batch', 'model') cuts the outputs" in advice(both, row)
    # A row that follows a column gathers nothing backward.
    assert not advice(both, row[:1])


@pytest.mark.parametrize(
    "axes, dims, expected",
    [
        ([None, ["model"]], None, [[[0, 2], [1, 3]]]),
        ([["batch"], ["model"]], None, [[[0], [1]], [[2], [3]]]),
        ([["model", "batch"], None], None, [[[0]], [[2]], [[1]], [[3]]]),
        ([None, None, ["model"], ["batch"]], None, [[[0], [2]], [[1], [3]]]),
        ([None, ["model"], None], (0, 1), [[[0, 2], [1, 3]]]),
        ([["batch"]], None, [[[0, 1], [2, 3]]]),
        ([], None, [[[0, 1, 2, 3]]]),
    ],
)
def test_who_stores_what(axes, dims, expected):
    from keras.src.distribution import report_pictures

    shape = (8,) * len(axes)
    v = variable("v", shape, axes, [None] * len(axes))
    assert report_pictures.cells(v, MESH, dims)[1] == expected


def test_pictures():
    report = Report(facts())
    assert report.picture("up/kernel").splitlines()[1:] == [
        "+---+---+",
        "| 0 | 1 |",
        "+---+---+",
        "| 2 | 3 |",
        "+---+---+",
    ]
    assert "head/kernel (64, 500)  | 0-3 |  whole" in report.picture()
    assert "block_*/key/kernel (8, 4, 2)  | 0,2 | / | 1,3 |" in report.picture()
    svg = report.svg("up/kernel")
    assert svg.startswith("<svg") and svg.count("<rect") == 4
    assert svg in Report(facts(variables=facts()["variables"][4:5])).svg() or (
        report._repr_html_().count("<svg") == 1
    )
    with pytest.raises(ValueError, match="no variable of this path"):
        report.picture("nothing")


def test_difference():
    other = facts()
    other["variables"][4] = variable(
        "up/kernel", (8, 64), [None, ["model"]], ["in", "out"], "u"
    )
    other["collectives"] = other["collectives"][:-1]
    text = Report(facts()).diff(Report(other))
    assert "column over model, FSDP over batch  column over model" in text
    assert "weights cut over batch (FSDP): all-gather batch  1, 512 B" in text
    assert "9, 8.5 KiB  8, 8.0 KiB" in text
    same = Report(facts()).diff(Report(facts()))
    assert same.startswith("the same cuts") and "block" not in same


def test_what_a_cut_is_called():
    for axes, roles, words in (
        ([["model"], None], ["vocabulary", "width"], "vocabulary over model"),
        ([None, ["model"]], ["vocabulary", "width"], "width over model"),
        ([["model"]], ["out"], "column over model"),
        ([None, ["model"]], [None, None], "dim 1 over model"),
        ([["model", "batch"]], ["in"], "row over model, FSDP over batch"),
    ):
        v = variable("v", (8,) * len(axes), axes, roles)
        assert layout_facts.cut_as(v, MESH) == words
