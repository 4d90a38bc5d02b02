"""Which loader is chosen, and that broken bytes end in FormatError whatever they are."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gencompress.files import FormatError
from gencompress.views.loaders import load_points, load_views

fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_same_cameras_from_every_format(tmp_path, cameras, some_points, writers, same_camera):
    _, write_transforms, write_colmap = writers
    write_transforms(tmp_path / "a", cameras)
    write_colmap(tmp_path / "b", cameras, some_points, text=False)
    write_colmap(tmp_path / "c", cameras, some_points, text=True)
    for views in zip(*(load_views(tmp_path / name) for name in "abc"), strict=True):
        same_camera(views[0], views[1])
        same_camera(views[1], views[2])


def test_transforms_win_and_the_model_folder_can_be_named(tmp_path, cameras, some_points, writers):
    _, write_transforms, write_colmap = writers
    model = write_colmap(tmp_path, cameras, some_points, text=False)
    write_transforms(tmp_path, cameras[:2])
    assert len(load_views(tmp_path)) == 2
    assert len(load_views(model)) == 5
    with pytest.raises(ValueError, match="images='images_2' is for COLMAP"):
        load_views(tmp_path, images="images_2")


def test_nothing_to_load(tmp_path):
    with pytest.raises(FormatError, match="expected transforms.json"):
        load_views(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_views(tmp_path / "absent")
    (tmp_path / "scene.ply").touch()
    with pytest.raises(FormatError, match=r"expected a folder or a transforms \.json"):
        load_views(tmp_path / "scene.ply")
    assert load_points(tmp_path) is None


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """Up to four edits, each at a share of the file's length."""
    edit = st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    )
    return draw(st.lists(edit, min_size=1, max_size=4))


def damaged(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, junk in edits:
        at = int(share * len(data))
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + junk + data[at:]
        else:
            put = junk if kind == "replace" else b""
            data = data[:at] + put + data[at + len(junk) :]
    return data


def load_all(folder: Path) -> None:
    """Loads what there is; only FormatError may come out."""
    for load in (load_views, load_points):
        try:
            loaded = load(folder)
        except FormatError:
            continue
        if load is load_views:
            assert all(view.world_to_camera.isfinite().all() for view in loaded)
        elif loaded is not None:
            assert np.isfinite(loaded[0]).all()


def run_damaged(folder: Path, file: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "capture"))
        (copy / file).write_bytes(data)
        load_all(copy)


@fuzz
@given(edits=damage())
def test_fuzz_transforms_bytes(transforms_capture, edits):
    data = (transforms_capture / "transforms.json").read_bytes()
    run_damaged(transforms_capture, "transforms.json", damaged(data, edits))


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1e308, -1e308, 10**400, "..", "/", "images", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
KEYS = ["w", "h", "fl_x", "fl_y", "cx", "k1", "k3", "p1", "camera_angle_x", "camera_model"]
KEYS += ["file_path", "mask_path", "transform_matrix", "distortion_params", "is_fisheye"]


@fuzz
@given(
    top=st.dictionaries(
        st.sampled_from([*KEYS, "frames", "ply_file_path", "applied_transform"]), junk, max_size=3
    ),
    frame=st.dictionaries(st.sampled_from(KEYS), junk, max_size=3),
    row=st.integers(0, 3),
    entry=junk,
)
def test_fuzz_transforms_values(transforms_capture, top, frame, row, entry):
    whole = json.loads((transforms_capture / "transforms.json").read_text())
    whole["frames"][1]["transform_matrix"][row][row] = entry
    whole["frames"][0] |= frame
    run_damaged(transforms_capture, "transforms.json", json.dumps(whole | top).encode())


@fuzz
@given(edits=damage(), file=st.sampled_from(["cameras", "images", "points3D"]))
def test_fuzz_colmap(colmap_capture, edits, file):
    (path,) = (colmap_capture / "sparse" / "0").glob(f"{file}.*")
    relative = str(path.relative_to(colmap_capture))
    run_damaged(colmap_capture, relative, damaged(path.read_bytes(), edits))


@fuzz
@given(edits=damage(), name=st.sampled_from(["points3d.npz", "points3d.ply", "ascii.ply"]))
def test_fuzz_points(transforms_capture, edits, name):
    xyz = np.arange(12, dtype=np.float32).reshape(4, 3)
    if name.endswith(".npz"):
        np.savez_compressed(transforms_capture / "whole.npz", xyz=xyz, rgb=xyz.astype(np.uint8))
        data = (transforms_capture / "whole.npz").read_bytes()
    else:
        layout = "ascii" if name == "ascii.ply" else "binary_little_endian"
        body = str(xyz.ravel()).strip("[]").encode() if layout == "ascii" else xyz.tobytes()
        head = f"ply\nformat {layout} 1.0\nelement vertex 4\n"
        head += "".join(f"property float {axis}\n" for axis in "xyz")
        data = f"{head}end_header\n".encode() + body
    run_damaged(transforms_capture, name.replace("ascii", "points3d"), damaged(data, edits))


@fuzz
@given(edits=damage())
def test_fuzz_photo(transforms_capture, edits):
    photo = transforms_capture / "images" / "0000.png"
    run_damaged(transforms_capture, "images/0000.png", damaged(photo.read_bytes(), edits))
