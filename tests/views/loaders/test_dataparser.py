"""Captures in the frame of what nerfstudio trained on them."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from gencompress.files import FormatError
from gencompress.views.camera import project
from gencompress.views.loaders import load_points, load_views

APPLIED = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0.25]])
OLD = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]])


def told(folder, applied, scale=0.4, seed=0):
    """Writes what nerfstudio would: a dataparser's transform after the applied one."""
    rigid = np.eye(4)
    rigid[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    rigid[:3, 3] = [0.5, -2.0, 1.0]
    whole = rigid @ np.vstack([applied, [0, 0, 0, 1]])
    values = {"transform": whole[:3].tolist(), "scale": scale}
    (folder / "dataparser_transforms.json").write_text(json.dumps(values))
    return rigid, scale


def points_file(folder, xyz):
    np.savez(folder / "points3d.npz", xyz=xyz)


@pytest.mark.parametrize("kind", ["noted", "of colmap", "none"])
def test_points_stay_on_their_pixels(transforms_capture, kind):
    """In both frames each camera sees each point at the same place; depths scale."""
    folder = transforms_capture
    xyz = np.random.default_rng(0).normal(size=(20, 3)) * 0.2 + [0.5, -1.0, 2.0]
    points_file(folder, xyz)
    applied = {"noted": APPLIED, "of colmap": OLD, "none": np.eye(4)[:3]}[kind]
    if kind == "noted":
        top = json.loads((folder / "transforms.json").read_text())
        top["applied_transform"] = applied.tolist()
        (folder / "transforms.json").write_text(json.dumps(top))
    elif kind == "of colmap":
        (folder / "colmap/sparse/0").mkdir(parents=True)
    before, points = load_views(folder), load_points(folder)[0]
    rigid, scale = told(folder, applied)
    after, moved = load_views(folder), load_points(folder)[0]
    wanted = scale * (points @ rigid[:3, :3].T + rigid[:3, 3])
    assert np.allclose(moved, wanted, atol=1e-5)
    for old, new in zip(before, after, strict=True):
        assert (old.name, old.fx, old.distortion, old.image) == (
            *(new.name, new.fx, new.distortion, new.image),
        )
        seen, depth = project(old, torch.from_numpy(points))
        again, deep = project(new, torch.from_numpy(moved))
        assert torch.allclose(seen, again, atol=1e-3)
        assert torch.allclose(deep, scale * depth, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"transform": np.eye(4)[:3].tolist()}, "scale is None"),
        ({"transform": np.eye(4)[:3].tolist(), "scale": 0}, "above 0"),
        ({"scale": 1.0}, "not a 4 x 4"),
        ({"transform": (2 * np.eye(4))[:3].tolist(), "scale": 1.0}, "not rigid"),
        ([], "expected an object"),
    ],
)
def test_what_is_refused(transforms_capture, values, says):
    path = transforms_capture / "dataparser_transforms.json"
    path.write_text(json.dumps(values))
    with pytest.raises(FormatError, match=says) as caught:
        load_views(transforms_capture)
    assert caught.value.path == str(path)
