import json
import os
import shutil
import sys

import numpy as np
import pytest

import keras
from keras.src.distribution import replacing
from keras.src.distribution.replacing import CONFIG


class Killed(BaseException):
    pass


def killed_at(monkeypatch, count):
    """Ends a program before one of the calls that change names."""
    left = [count]

    def ends(function):
        def call(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("replace", "link", "unlink"):
        monkeypatch.setattr(os, name, ends(getattr(os, name)))


def write_set(folder, value, count):
    folder.mkdir(exist_ok=True)
    names = [f"m_{i:05}.weights.h5" for i in range(count)]
    for name in names:
        (folder / name).write_text(value)
    said = {"metadata": {}, "weight_map": {n: n for n in names[1:]}}
    said["weight_map"]["both"] = names[:2]
    (folder / "m.weights.json").write_text(json.dumps(said))
    return folder


def read_set(folder):
    """What the files of a list say, which Keras can open."""
    (folder / "m_00000.weights.h5").read_text()
    said = json.loads((folder / "m.weights.json").read_text())["weight_map"]
    names = [n for named in said.values() for n in replacing._as_list(named)]
    return [(folder / name).read_text() for name in names]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_a_set_is_replaced_at_once(counts, links, tmp_path, monkeypatch):
    def no_link(*args):
        raise OSError("not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    others = tmp_path / "m_00009.weights.h5", tmp_path / "n_00000.weights.h5"
    for path in others:
        path.write_text("of others")
    seen = set()
    for count in range(40):
        replacing.move(write_set(tmp_path / "1", "1", counts[0]), tmp_path)
        with monkeypatch.context() as patch:
            killed_at(patch, count)
            try:
                new = write_set(tmp_path / "2", "2", counts[1])
                replacing.move(new, tmp_path)
                is_done = True
            except Killed:
                is_done = False
        (value,) = set(read_set(tmp_path))
        assert len(read_set(tmp_path)) == counts["12".index(value)] + 1
        seen.add(value)
        if is_done:
            break
        # What was left is gone with the next.
        replacing.move(write_set(tmp_path / "2", "2", counts[1]), tmp_path)
        assert set(read_set(tmp_path)) == {"2"}
        marked = {path.name for path in tmp_path.glob("*.new*")}
        named = replacing._named_by(tmp_path / "m.weights.json")
        assert marked <= (set() if links else set(named))
    assert is_done and count > 5 and seen == {"1", "2"}
    assert all(path.read_text() == "of others" for path in others)


def write_model(folder, value, config, assets=None):
    folder = folder / "m"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.weights.h5").write_text(value)
    (folder / "metadata.json").write_text(value)
    (folder / "config.json").write_text(config)
    (folder / "assets").mkdir(exist_ok=True)
    if assets:
        (folder / "assets" / "words").write_text(assets)
    return folder.parent


def read_all(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged")
@pytest.mark.parametrize(
    "config, assets", [("same", None), ("other", None), ("same", "a")]
)
def test_a_folder_is_replaced_at_once(config, assets, tmp_path, monkeypatch):
    destination, exchange = tmp_path / "there", replacing._exchange
    (tmp_path / "link").symlink_to(destination)
    for count in range(20):
        write_model(destination, "1", "same")
        write_set(destination / "m", "1", 3)
        (destination / "m" / "assets" / "old").write_text("of the old one")
        (destination / "m" / "of others").write_text("of others")
        (destination / "m").chmod(0o750)
        old = read_all(destination)
        with monkeypatch.context() as patch:
            killed_at(patch, count)
            link = os.link

            def exchanges(*args):
                link(destination / "m" / CONFIG, tmp_path / "none")
                (tmp_path / "none").unlink()
                exchange(*args)

            patch.setattr(replacing, "_exchange", exchanges)
            try:
                new = write_model(tmp_path / "2", "2", config, assets)
                write_set(new / "m", "2", 2)
                expected = {**old, **read_all(new)}
                del expected["m/m_00002.weights.h5"]
                replacing.move(new, tmp_path / "link")
                is_done = True
            except Killed:
                is_done = False
        found = read_all(destination)
        assert found in ((expected,) if is_done else (old, expected))
        assert (destination / "m").stat().st_mode & 0o777 == 0o750
        for left in ("2", "none", "there"):
            path = tmp_path / left
            shutil.rmtree(path) if path.is_dir() else path.unlink(True)
        if is_done:
            break
    assert is_done and count > 2


@pytest.mark.parametrize(
    "config, assets, stays",
    [("same", None, True), ("other", None, False), ("same", "a", False)],
)
def test_a_folder_with_a_model(config, assets, stays, tmp_path, monkeypatch):
    def no_exchange(*args):
        raise OSError("not supported")

    monkeypatch.setattr(replacing, "_exchange", no_exchange)
    destination = tmp_path / "there"
    write_model(destination, "1", "same")
    for count in range(20):
        with monkeypatch.context() as patch:
            killed_at(patch, count)
            try:
                new = write_model(tmp_path / "2", "2", config, assets)
                replacing.move(new, destination)
                is_done = True
            except Killed:
                is_done = False
        is_there = (destination / "m" / "config.json").exists()
        assert is_there or not stays
        if is_there and config == "other" and not is_done:
            # Nothing has been moved yet.
            assert (destination / "m/model.weights.h5").read_text() == "1"
        write_model(destination, "1", "same")
        if is_done:
            break
    assert is_done and is_there


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    sync, replace = replacing.sync, os.replace
    monkeypatch.setattr(
        replacing, "sync", lambda p: events.append(("sync", p.name)) or sync(p)
    )
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: events.append(("replace", b.name)) or replace(a, b),
    )
    new = tmp_path / "new"
    new.mkdir()
    (new / "m.keras").write_text("1")
    replacing.move(new, tmp_path)
    # Else a machine that is switched off may leave an empty file.
    assert events == [("sync", "m.keras"), ("replace", "m.keras")]


def test_keras_opens_a_set_with_other_names(tmp_path, monkeypatch):
    def no_link(*args):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_link)
    model = keras.Sequential(
        [keras.Input((9,)), *(keras.layers.Dense(9) for _ in range(3))]
    )
    for value in (1, 2):
        model.set_weights([np.full_like(w, value) for w in model.get_weights()])
        (tmp_path / "new").mkdir(exist_ok=True)
        model.save_weights(
            tmp_path / "new" / "m.weights.json", max_shard_size=4e-7
        )
        replacing.move(tmp_path / "new", tmp_path)
    assert len(list(tmp_path.glob("m_0000?.new.weights.h5"))) > 1
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    model.load_weights(tmp_path / "m.weights.json")
    assert all((w == 2).all() for w in model.get_weights())
