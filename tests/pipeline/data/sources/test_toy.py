"""Toy CelebA: statistics of the attributes, their visibility, reproducible files in the official layout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.data.sources.toy.attributes import EXCLUDED_BY, EXCLUSIVE, MARGINALS, NAMES, sample_attributes
from pipeline.data.sources.toy.canvas import smooth
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.data.sources.toy.faces import draw_face
from pipeline.data.sources.toy.style import sample_style
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.preempt import StopFlag, Stopped

INDEX = {name: i for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return sample_attributes(np.random.default_rng(0).standard_normal((60_000, 40)))


def test_marginals_are_those_of_celeba(sample: np.ndarray) -> None:
    assert NAMES == CELEBA_ATTRIBUTES
    off = {
        name: round(abs(share - MARGINALS[name]), 3)
        for name, share in zip(NAMES, sample.mean(axis=0), strict=True)
    }
    assert max(off.values()) < 0.025, off


@pytest.mark.parametrize(
    ("a", "b", "phi"),  # correlation coefficient of the two labels in the official annotations
    [
        ("Male", "Heavy_Makeup", -0.67),
        ("Male", "Wearing_Lipstick", -0.79),
        ("Heavy_Makeup", "Wearing_Lipstick", 0.80),
        ("Male", "No_Beard", -0.52),
        ("Goatee", "No_Beard", -0.57),
        ("Smiling", "High_Cheekbones", 0.68),
        ("Smiling", "Mouth_Slightly_Open", 0.54),
        ("Young", "Gray_Hair", -0.36),
        ("Attractive", "Young", 0.39),
        ("Chubby", "Double_Chin", 0.53),
        ("Male", "Wearing_Necktie", 0.33),
    ],
)
def test_correlations_are_those_of_celeba(sample: np.ndarray, a: str, b: str, phi: float) -> None:
    assert np.corrcoef(sample[:, INDEX[a]], sample[:, INDEX[b]])[0, 1] == pytest.approx(phi, abs=0.08)


def test_rare_combinations_exist_and_impossible_ones_do_not(sample: np.ndarray) -> None:
    made_up_men = (sample[:, INDEX["Male"]] & sample[:, INDEX["Heavy_Makeup"]]).mean()
    assert 0.0005 < made_up_men < 0.01
    for group in EXCLUSIVE:
        assert sample[:, [INDEX[name] for name in group]].sum(axis=1).max() == 1
    for name, excluded in EXCLUDED_BY.items():
        assert not (sample[:, [INDEX[name]]] & sample[:, [INDEX[other] for other in excluded]]).any()


def test_attributes_of_a_row_do_not_depend_on_the_others() -> None:
    noise = np.random.default_rng(1).standard_normal((50, 40))
    assert (sample_attributes(noise)[17] == sample_attributes(noise[17:18])[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_attribute_is_visible_in_a_small_crop(name: str) -> None:
    base = {"Young", "Attractive", "No_Beard", "Brown_Hair"} - {name}
    shown = base | {name}
    if name in {"Black_Hair", "Blond_Hair", "Gray_Hair"}:
        shown -= {"Brown_Hair"}
    change = []
    for seed in range(3):
        style = sample_style(np.random.default_rng(seed))
        pair = [draw_face(frozenset(a), style).crop((15, 35, 163, 183)).reduce(2) for a in (base, shown)]
        change.append(np.abs(np.asarray(pair[0], float) - np.asarray(pair[1], float)).max(axis=2))
    assert min(float(c.max()) for c in change) > 20  # of 255, at the pixel that changes most
    assert min(int((c > 8).sum()) for c in change) >= 12  # pixels


def test_eyes_lie_where_celeba_has_them() -> None:
    style = sample_style(np.random.default_rng(5))
    faces = [
        np.asarray(draw_face(frozenset({"Young", "No_Beard", *extra}), style), float)
        for extra in ((), ("Eyeglasses",))
    ]
    rows, columns = np.nonzero(np.abs(faces[0] - faces[1]).max(axis=2) > 40)
    assert abs(rows.mean() - 111) < 8 and abs(columns.mean() - 89) < 8


def test_curves_pass_through_their_knots() -> None:
    knots = np.array([(0.0, 0.0), (3.0, 4.0), (7.0, 1.0), (9.0, 9.0)])
    path = smooth(knots)
    assert np.allclose(path[::6], knots)
    assert np.abs(np.diff(path, axis=0)).max() < 3


def test_official_layout(tmp_path: Path) -> None:
    make_toy_celeba(tmp_path / "toy", n=21, seed=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy"]
    lines = (tmp_path / "toy/list_attr_celeba.txt").read_text().splitlines()
    assert lines[0] == "21" and tuple(lines[1].split()) == NAMES and len(lines) == 23
    assert set(" ".join(lines[2:]).replace(".jpg", "").split()) >= {"-1", "1", "000001", "000021"}
    assert all(len(line) == len("000001.jpg") + 40 * 3 for line in lines[2:])
    rows = [line.split() for line in (tmp_path / "toy/list_eval_partition.txt").read_text().splitlines()]
    assert [name for name, _ in rows] == [f"{i:06d}.jpg" for i in range(1, 22)]
    assert {part for _, part in rows[:20]} == {"0", "1", "2"} and sum(
        part == "0" for _, part in rows[:20]
    ) == 16
    for name, _ in rows:
        with Image.open(tmp_path / "toy/img_align_celeba" / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (178, 218))


def test_bytes_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    def images(name: str, n: int, seed: int, processes: int = 1) -> list[bytes]:
        make_toy_celeba(tmp_path / name, n, seed, processes)
        return [p.read_bytes() for p in sorted((tmp_path / name / "img_align_celeba").iterdir())]

    few = images("few", 20, 0)
    assert images("many, two processes", 60, 0, processes=2)[:20] == few
    assert not set(images("other seed", 20, 1)) & set(few)
    assert len(set(few)) == 20


def test_complete_folder_is_left_alone_and_others_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    make_toy_celeba(out, n=3, seed=0)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")}
    make_toy_celeba(out, n=3, seed=0)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")} == before
    for n, seed in ((4, 0), (3, 1)):
        with pytest.raises(DataError, match="toy"):
            make_toy_celeba(out, n, seed)
    (out / "img_align_celeba/000002.jpg").unlink()
    with pytest.raises(DataError, match="3 toy faces"):
        make_toy_celeba(out, n=3, seed=0)
    with pytest.raises(ConfigError, match=r"toy\.n"):
        make_toy_celeba(tmp_path / "none", n=0, seed=0)


def test_nothing_is_left_behind_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Image.Image:
        raise RuntimeError("no ink")

    monkeypatch.setattr("pipeline.data.sources.toy.dataset.draw_face", broken)
    with pytest.raises(RuntimeError, match="no ink"):
        make_toy_celeba(tmp_path / "toy", n=2, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_every_process_neither_hangs_nor_loses_faces(number: int, tmp_path: Path) -> None:
    """A hang-up reaches workers too, which leave it to their parent. A killed worker is an error."""
    out = tmp_path / "toy"
    script = (
        "import logging, pathlib, sys\n"
        "from pipeline.data.sources.toy.dataset import make_toy_celeba\n"
        "if __name__ == '__main__':\n"
        "    make_toy_celeba(pathlib.Path(sys.argv[1]), 300, 0, processes=2)\n"
    )
    file = tmp_path / "draw.py"
    file.write_text(script)
    drawing = subprocess.Popen([sys.executable, str(file), str(out)], stderr=subprocess.PIPE)
    while len(list(tmp_path.glob(".toy.*/img_align_celeba/*.jpg"))) < 60:  # both workers draw
        assert drawing.poll() is None
        time.sleep(0.01)
    for pid in workers_of(drawing.pid):
        os.kill(pid, number)
    _, said = drawing.communicate(timeout=300)
    if number == signal.SIGKILL:
        assert drawing.returncode == 1 and b"BrokenProcessPool" in said
        assert [path.name for path in tmp_path.iterdir()] == ["draw.py"]
    else:
        assert drawing.returncode == 0
        assert len(list((out / "img_align_celeba").iterdir())) == 300


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_request_ends_the_drawing_and_leaves_nothing(processes: int, tmp_path: Path) -> None:
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(Stopped, match="asked to stop"):
        make_toy_celeba(tmp_path / "toy", 1000, 0, processes, stop=stop)
    assert not list(tmp_path.iterdir())


def workers_of(pid: int) -> list[int]:
    """Return the worker processes of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
