"""Checkpoints on disk: sealed, retained, set aside, written from a copy."""

import json
import shutil
import threading

import pytest
import torch

from pipeline.errors import CheckpointError, StorageError
from pipeline.training.checkpoints import store as checkpoint
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.checkpoints.store import Checkpoints

META = {
    "images": 8,
    "seconds": 1.0,
    "attributes": ["Male"],
    "size": 16,
    "sections": {},
    "scaler": {},
    "validation": None,
}


def validated(loss: float) -> dict:
    return META | {"validation": {"val_ema/loss": loss}}


def weights(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((4, 3), value)}


def test_the_best_one_is_the_best_in_what_was_minimised(tmp_path):
    """The loss of a validation is the negative ELBO; other loss terms count with their weight."""
    store = Checkpoints(tmp_path, keep=3)
    losses = {"edges": {"weight": 0.0}, "perceptual": {"weight": 2.0, "style": 8.0}}
    for step, elbo, perceptual in ((10, -7952.2, 6631.8), (20, -7941.4, 6609.0), (30, -7945.0, 6640.0)):
        values = {"val_ema/loss": elbo, "val_ema/perceptual": perceptual, "val_ema/edges": -1e6}
        meta = META | {"sections": {"model": {"losses": losses}}, "validation": values}
        store.save(step, weights(step), meta)
    assert store.best() == 20


def test_the_last_the_best_and_every_nth_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2, keep_every=400)
    for step, loss in zip(range(100, 1100, 100), [9, 5, 7, 8, 9, 9, 9, 9, 9, float("nan")], strict=True):
        store.save(step, weights(step), validated(loss))
    assert store.steps() == [200, 400, 800, 900, 1000] and store.best() == 200
    assert {p.stem for p in tmp_path.iterdir()} == {f"step_{s:08d}" for s in store.steps()}
    assert float(store.read(400).tensors("model.")["w"][0, 0]) == 400


@pytest.mark.parametrize("at", range(0, 900, 23))
def test_one_bit_anywhere_in_the_json_is_found(tmp_path, at):
    store = Checkpoints(tmp_path)
    store.save(10, weights(1), validated(2.5))
    store.save(20, weights(2), validated(1.5))
    file = store.path(20).with_suffix(".json")
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 4
    if not content[at % len(content) : at % len(content) + 1].isspace() and json_of(content) != json_of(
        file.read_bytes()
    ):
        file.write_bytes(content)
        assert store.newest().step == 10 and store.best() == 10


def json_of(content: bytes) -> object:
    try:
        return json.loads(bytes(content))
    except ValueError:
        return None


def test_damage_is_set_aside_and_beginning_again_is_never_silent(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(10, weights(), META)
    store.path(10).write_bytes(b"")
    for _ in range(2):  # also after it was set aside
        with pytest.raises(
            CheckpointError, match="none of its checkpoints is intact; remove .* to begin again"
        ):
            store.newest(set_aside=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_00000010.json.damaged",
        "step_00000010.safetensors.damaged",
    ]


def test_what_a_dead_writer_left_is_cleared(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(10, weights(), META)
    for name in ("step_00000020.tmp", "step_00000020.safetensors", ".step_00000020.json.77.tmp"):
        (tmp_path / name).write_bytes(b"half")
    store.clear_unfinished()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010.json", "step_00000010.safetensors"]
    (tmp_path / "step_x.json").write_text("{}")
    assert store.steps() == [10]


def test_checkpoints_of_the_format_before_are_read(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(10, weights(), META)
    file = store.path(10).with_suffix(".json")
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"} | {"format": 1}
    file.write_text(json.dumps(old))
    assert store.newest().step == 10


def test_a_copy_is_saved_while_the_weights_move_on(tmp_path, monkeypatch):
    """The write waits until training has changed the weights; the file holds those of the save."""
    moved, order = threading.Event(), []
    save_file = checkpoint.save_file

    def held_back(*args):
        assert moved.wait(60)
        order.append("written")
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", held_back)
    state, store = weights(1), Checkpoints(tmp_path)
    state["model.c"] = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    saver = Saver(store, lambda: order.append("metrics durable"))
    saver.save(5, state, META)
    assert store.steps() == []
    for tensor in state.values():
        tensor.add_(1)
    moved.set()
    saver.save(6, state, META)  # waits for the one before
    assert 5 in store.steps()
    saver.close()
    assert order == ["metrics durable", "written"] * 2
    assert (
        float(store.read(5).tensors("model.")["w"][0, 0]) == 1
        and float(store.read(6).tensors("model.")["w"][0, 0]) == 2
    )
    assert torch.equal(store.read(5).tensors("model.")["c"], torch.arange(24.0).reshape(1, 2, 3, 4))


def test_a_disk_that_refuses_is_a_named_error_and_the_one_before_stays(tmp_path):
    folder = tmp_path / "checkpoints"
    store = Checkpoints(folder)
    store.save(10, weights(), META)
    shutil.move(folder, tmp_path / "kept")
    folder.write_text("not a folder any more")
    saver = Saver(store)
    saver.save(20, weights(), META)
    with pytest.raises(StorageError, match="step_00000020.safetensors: could not be written"):
        saver.close()
    saver.poll()  # told once


def test_a_scaler_survives_json():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = json.loads(json.dumps(scaler.state_dict()))
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(state)
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 1024.0
