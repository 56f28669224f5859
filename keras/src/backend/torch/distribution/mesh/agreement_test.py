import pickle

import numpy as np
import pytest
import torch

from keras.src import backend
from keras.src import models
from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.backend.torch.distribution.mesh import configuration
from keras.src.backend.torch.distribution.mesh import trail

WORLD = 3
SAME = {"batch, x": np.arange(3.0), "learning rate": 0.1, "argument": None}


def ballots(on_threads, facts):
    """What a ballot of such facts ends with on each process."""

    def run(rank):
        ballot = agreement.Ballot(facts[rank])
        try:
            ballot.check(agreement.add_up(ballot.numbers), "in a test")
        except ValueError as error:
            return str(error)
        return "same"

    return on_threads(len(facts), run)


def test_same_facts(on_threads):
    assert ballots(on_threads, [SAME] * WORLD) == ["same"] * WORLD


@pytest.mark.parametrize(
    "odd, said",
    [
        ({"learning rate": 0.2}, "learning rate: 0.1 on processes 0, 2; 0.2"),
        ({"batch, x": np.arange(3.0)[::-1]}, "batch, x: [0, 1, 2] on pro"),
        ({"batch, x": np.arange(4.0)}, "batch, x: [0, 1, 2] on pro"),
        ({"batch, x": np.array([0, np.nan, 2])}, "[0, nan, 2] on process 1"),
        ({"batch, x": np.arange(3)}, "batch, x"),
        ({"more": 1}, "more: nothing on processes 0, 2; 1 on process 1"),
    ],
)
def test_a_fact_of_one_process(on_threads, odd, said):
    for text in ballots(on_threads, [SAME, {**SAME, **odd}, SAME]):
        assert said in text
        assert "in a test" in text


def test_numbers_whose_mean_is_one_of_them(on_threads, monkeypatch):
    # By their sum alone, process 1 would see nothing wrong.
    monkeypatch.setattr(agreement, "digest", lambda facts: facts["number"])
    texts = ballots(on_threads, [{"number": i} for i in range(WORLD)])
    assert all("number" in text for text in texts)


def test_rounding_is_no_disagreement(on_threads, caplog):
    close = {**SAME, "batch, x": np.arange(3.0) * (1 + 1e-7)}
    assert ballots(on_threads, [SAME, close]) == ["same"] * 2
    assert not caplog.records
    drifted = {**SAME, "batch, x": np.arange(3.0) * (1 + 1e-4)}
    assert ballots(on_threads, [SAME, drifted]) == ["same"] * 2
    assert "1.0e-04" in caplog.text and "batch, x" in caplog.text
    apart = {**SAME, "batch, x": np.arange(3.0) * 1.02}
    assert all("batch" in t for t in ballots(on_threads, [SAME, apart]))


def test_zeros_of_both_signs_are_equal():
    facts = {0: {"x": np.array([0.0])}, 1: {"x": np.array([-0.0])}}
    assert not agreement.differences(facts)


def test_advice_is_that_of_what_differs(on_threads):
    for name, word in {
        "batch, x": "auto_shard_dataset",
        "weights, a/b": "one file",
        "learning rate": "Callbacks",
        "argument epochs of fit": "arguments",
    }.items():
        facts = [{name: 1}, {name: 2}]
        assert all(word in text for text in ballots(on_threads, facts))


def test_many_are_counted(on_threads):
    facts = [{f"fact {i}": rank for i in range(7)} for rank in range(2)]
    for text in ballots(on_threads, facts):
        assert "fact 4" in text and "fact 5" not in text
        assert "and 2 more" in text


def test_data_shards_have_facts_of_their_own(on_threads):
    def run(rank):
        facts = {"batch, x": (1, 1, 2, 3)[rank]}
        with pytest.raises(ValueError) as error:
            agreement.check(facts, shards=[0, 0, 1, 1])
        agreement.check(facts, shards=[0, 0, 1, 2])
        return str(error.value)

    for text in on_threads(4, run):
        assert "batch, x: 2 on process 2; 3 on process 3" in text


@pytest.mark.parametrize(
    "x, taken",
    [
        (np.arange(10.0), [0, 3, 6, 9]),
        (torch.arange(10), [0, 3, 6, 9]),
        (torch.arange(3, dtype=torch.bfloat16), [0, 1, 2]),
        (np.float32(4), [4]),
        (np.arange(64).reshape(2, 32), [*range(0, 64, 2)]),
        (torch.arange(6).reshape(2, 3).T, [0, 3, 1, 4, 2, 5]),
    ],
)
def test_sample(x, taken):
    assert agreement.sample(x).tolist() == taken


def test_sample_of_what_has_no_numbers():
    assert agreement.sample(np.array(["a", "b"])) == "['a', 'b']"
    assert agreement.sample(torch.empty(0, 3)) == "torch.float32 (0, 3)"
    assert agreement.sample(np.empty((0, 3))) == "float64 (0, 3)"
    assert (
        agreement.sample(torch.ones(2, device="meta")) == "torch.float32 (2,)"
    )
    assert agreement.sample(object()) == ""


def test_sample_of_floats_that_numpy_lacks():
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        taken = agreement.sample(torch.tensor([1.0, -2.0]).to(dtype))
        assert taken.dtype == np.float32 and taken.tolist() == [1.0, -2.0]


def test_parts_of_a_batch():
    x, y = np.arange(2), np.arange(3)
    assert list(agreement.facts_of_batch((x, y))) == ["batch, x", "batch, y"]
    assert list(agreement.facts_of_batch(x)) == ["batch, x"]
    facts = agreement.facts_of_batch(({"a": x, "b": y}, None))
    assert list(facts) == ["batch, x[0]", "batch, x[1]"]


def test_weights():
    variables = [
        backend.Variable(np.arange(40.0), name="a", dtype="float32"),
        backend.Variable(np.ones(2), name="b", dtype="float32"),
        backend.Variable(
            np.arange(2), name="c", dtype="int64", trainable=False
        ),
        backend.Variable(np.ones((0, 2)), name="none", dtype="float32"),
    ]
    names = configuration.Names(models.Sequential())
    facts = agreement.facts_of_weights(variables, names)
    assert {name: fact.tolist() for name, fact in facts.items()} == {
        "weights, a": list(range(0, 40, 2)),
        "weights, b": [1, 1],
        "weights, c": [0, 1],
    }


def trails(*names):
    """Of ranks, what their layers have communicated for, in pairs of a data
    shard and names."""
    found = {}
    for rank, (shard, each) in enumerate(names):
        made = trail.Trail(each.split())
        made.shard = shard
        found[rank] = {agreement.COMMUNICATED: made}
    return found


def test_layers_are_compared_within_a_data_shard():
    same = trails((0, "a b"), (0, "a b"), (1, "a c b"), (1, "a c b"))
    assert agreement.differences(same) == []
    (wrong,) = agreement.differences(
        trails((0, "a b"), (0, "a b"), (1, "a c b"), (1, "a b c"))
    )
    assert wrong.values == {
        "'c, as number 2'": [2],
        "'b, as number 2'": [3],
    }
    (wrong,) = agreement.differences(trails((None, "a"), (None, "a b")))
    assert wrong.values == {
        "'nothing, after 1'": [0],
        "'b, as number 2'": [1],
    }
    facts = pickle.loads(pickle.dumps(same))
    assert [each[agreement.COMMUNICATED].shard for each in facts.values()] == [
        *(0, 0, 1, 1)
    ]
