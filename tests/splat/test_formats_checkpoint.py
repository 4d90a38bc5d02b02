"""Checkpoints of gsplat: what is read, and that nothing in them is run."""

import os
import zipfile

import pytest
import torch
from splat.scene_samples import ball

from gencompress import run
from gencompress.files import FormatError
from gencompress.splat.formats import describe, read_splats, write_splats


def splats(n=6, degree=1):
    cloud = ball(n, degree)
    return {
        "means": cloud.means,
        "quats": cloud.quats,
        "scales": cloud.scales,
        "opacities": cloud.opacities,
        "sh0": cloud.sh[:, :1].clone(),
        "shN": cloud.sh[:, 1:].clone(),
    }


@pytest.mark.parametrize("degree", [0, 3])
def test_what_gsplat_saved_is_what_is_read(tmp_path, degree):
    given = torch.nn.ParameterDict(splats(6, degree)).state_dict()
    torch.save({"step": 29_999, "splats": given}, tmp_path / "ckpt_29999_rank0.pt")
    back, cloud = read_splats(tmp_path / "ckpt_29999_rank0.pt"), ball(6, degree)
    for field in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.equal(getattr(back, field), getattr(cloud, field)), field
        assert not getattr(back, field).requires_grad
    told = describe(tmp_path / "ckpt_29999_rank0.pt")
    assert (told["format"], told["step"], told["count"]) == ("gsplat", 29_999, 6)
    run.convert(
        str(tmp_path / "ckpt_29999_rank0.pt"), tmp_path / "a.ply", strict=True, overwrite=False
    )
    assert torch.equal(read_splats(tmp_path / "a.ply").means, cloud.means)


class Bomb:
    """Makes a file when it is unpickled by a loader that runs what it finds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    found = {"step": 1, "splats": splats(), "more": Bomb(str(tmp_path / "ran"))}
    torch.save(found, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="plain tensors"):
        read_splats(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shN": None}, "no shN"),
        ({"means": torch.zeros(5, 3)}, "fit together"),
        ({"shN": torch.zeros(6, 2, 3)}, "fit together"),
        ({"sh0": torch.zeros(6, 3)}, "fit together"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, change, says):
    torch.save({"splats": splats() | change}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=says):
        read_splats(tmp_path / "a.pt")


def test_other_files_called_pt(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(FormatError, match="no table 'splats'"):
        read_splats(path)
    whole = path.read_bytes()
    for content in (b"", b"rubbish" * 30, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="a.pt"):
            read_splats(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", "{}")
    with pytest.raises(FormatError, match="a.pt"):
        read_splats(path)
    with pytest.raises(ValueError, match="unknown suffix"):
        write_splats(tmp_path / "b.pt", ball(3))
