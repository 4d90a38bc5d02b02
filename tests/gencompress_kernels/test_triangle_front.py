"""visible on every backend, against rays that meet all faces in float64."""

import pytest
import torch
from gencompress_kernels import rasterize_triangles as op
from gencompress_kernels.rasterize_triangles import visible
from triangle_samples import ball, camera, crumpled, flat, inside_a_ball, joined, to

OP = "rasterize_triangles"  # of the `backend` fixture

SCENES = {
    "ball": lambda: crumpled(2, 0.0, width=53, height=37),
    "crumpled": lambda: crumpled(2, 0.2, width=37, height=53, tilt=0.7),
    "inside": inside_a_ball,
    "one pixel": lambda: crumpled(0, 0.0, width=1, height=1, focal=6.0),
    "wide": lambda: flat([[-40, -900], [700, 90], [-35, 900.0]], width=200, height=70),
    "tilted": lambda: tilted(width=150, height=40),
}


def tilted(**size):
    """One large face from near to far, and a small one that pierces it."""
    vertices = [
        [-2, 0.4, 0.5],
        [3, 0.5, 6],
        [-1, -1.5, 7],
        [0, 0, 1],
        [0.4, 0.2, 1],
        [0.2, -0.3, 6],
    ]
    faces = torch.tensor([[0, 1, 2], [3, 4, 5]])
    cam = camera(**size, back=0.0)
    return {"vertices": torch.tensor(vertices), "faces": faces, **cam, "near": 0.05}


def rays(scene, view=0):
    """Of each pixel centre, float64: face, depth, weights [3]; and where rounding could decide."""
    near = scene.get("near", 1e-3)
    viewmat, lens = scene["viewmats"][view].double(), scene["intrinsics"][view].double()
    seen = scene["vertices"].double() @ viewmat[:3, :3].T + viewmat[:3, 3]
    x = torch.arange(scene["width"]).double() + 0.5
    y = torch.arange(scene["height"]).double() + 0.5
    pixel = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    ray = torch.cat([pixel, torch.ones_like(pixel[..., :1])], -1) @ torch.linalg.inv(lens).T
    corners = seen[scene["faces"]]  # ray * depth = corners^T @ weights, weights sum to 1
    system = torch.zeros(*ray.shape[:2], len(corners), 4, 4, dtype=torch.float64)
    system[..., :3, :3] = corners.mT
    system[..., :3, 3] = -ray[:, :, None]
    system[..., 3, :3] = 1
    wanted = torch.tensor([0, 0, 0, 1.0], dtype=torch.float64).expand(*system.shape[:-1])
    weights, depth = torch.linalg.solve(system, wanted).split([3, 1], -1)
    depth, margin = depth[..., 0], weights.amin(-1)
    met = torch.where((margin >= 0) & (depth >= near), depth, torch.inf)
    first, face = met.min(-1)
    close = (margin.abs() < 1e-4) & (depth > 0) & (depth < first[..., None] + 1e-4)
    close |= (depth - near).abs() < 1e-4 * near
    two = torch.sort(met, -1).values[..., :2]
    unclear = close.any(-1)
    if two.shape[-1] == 2:
        unclear |= two[..., 1] < two[..., 0] + 1e-5
    face = torch.where(first.isfinite(), face, -1)
    chosen = weights.gather(2, face.clamp(min=0)[..., None, None].expand(-1, -1, 1, 3))[..., 0, :]
    return face, first, torch.where(face[..., None] >= 0, chosen, 0.0), ~unclear


@pytest.mark.parametrize("name", SCENES)
def test_front_equals_rays(backend, name):
    scene = SCENES[name]()
    face, depth, weights, clear = rays(scene)
    assert clear.double().mean() > 0.95 and (name == "one pixel" or (face >= 0).sum() > 300)
    kinds = [(torch.float32, backend, 1e-4)]
    if backend == "reference":
        kinds.append((torch.float64, backend, 1e-9))
    for kind, which, slack in kinds:
        found = visible(**to(scene, kind), backend=which)
        assert found.faces.dtype == torch.int32 and found.depths.dtype == kind
        assert torch.equal(found.faces[0][clear].long(), face[clear])
        hit = clear & (face >= 0)
        assert ((found.depths[0] / depth - 1)[hit].abs() < slack).all()
        assert (found.depths[0][clear & (face < 0)] == torch.inf).all()
        assert ((found.weights[0] - weights)[clear].abs() < slack).all()


@pytest.mark.parametrize("name", SCENES)
def test_weights_lead_back_to_the_pixel(backend, name):
    scene = SCENES[name]()
    found = visible(**scene, backend=backend)
    row, column = (found.faces[0] >= 0).nonzero(as_tuple=True)
    weights = found.weights[0, row, column]
    assert (weights >= 0).all() and torch.allclose(weights.sum(1), torch.ones(1), atol=1e-5)
    corners = scene["vertices"][scene["faces"][found.faces[0, row, column].long()]]
    point = (weights[..., None] * corners).sum(1)
    seen = point @ scene["viewmats"][0, :3, :3].T + scene["viewmats"][0, :3, 3]
    pixel = seen @ scene["intrinsics"][0].T
    wanted = torch.stack([column, row], 1) + 0.5
    assert (pixel[:, :2] / pixel[:, 2:] - wanted).abs().max() < 2e-3
    assert torch.allclose(seen[:, 2], found.depths[0, row, column], rtol=1e-5)


def test_the_lower_of_equal_faces_is_in_front(backend):
    scene = crumpled(1, 0.1, width=33, height=21)
    count = len(scene["faces"])
    once = visible(**scene, backend=backend)
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    place = shuffle.argsort()
    twice = scene | {"faces": torch.cat([scene["faces"][shuffle], scene["faces"]])}
    found = visible(**twice, backend=backend)
    seen = once.faces >= 0
    assert torch.equal(found.faces[seen].long(), place[once.faces[seen].long()])
    assert (found.faces < count).all() and torch.equal(found.depths, once.depths)


def test_both_sides_of_a_face_are_alike(backend):
    scene = crumpled(1, 0.1, width=33, height=21)
    flipped = scene | {"faces": scene["faces"].flip(1)}
    one, other = visible(**scene, backend=backend), visible(**flipped, backend=backend)
    assert (one.faces == other.faces).double().mean() > 0.995
    same = one.faces == other.faces
    assert torch.allclose(one.depths[same], other.depths[same])
    assert torch.allclose(one.weights[same], other.weights[same].flip(1), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_pixel_falls_between_neighbours(backend, seed):
    g = torch.Generator().manual_seed(seed)
    side = torch.linspace(-1, 1, 24)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    grid[1:-1, 1:-1] += 0.02 * torch.randn(22, 22, 2, generator=g)
    angle = torch.rand((), generator=g) * 3
    if seed == 3:  # edges run through pixel centres
        angle, grid = torch.zeros(()), torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    points = grid.reshape(-1, 2) @ turn.T * 23 + 24.5
    index = torch.arange(24 * 24).view(24, 24)
    a, b, c, d = (
        part.reshape(-1)
        for part in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:])
    )
    swap = torch.rand(len(a), generator=g) < 0.5
    first = torch.where(swap[:, None], torch.stack([a, b, c], 1), torch.stack([a, b, d], 1))
    second = torch.where(swap[:, None], torch.stack([a, c, d], 1), torch.stack([b, c, d], 1))
    faces = torch.cat([first, second])[torch.randperm(2 * len(a), generator=g)]
    scene = flat(points, faces, 49, 49)
    x = torch.arange(49) + 0.5
    pixel = torch.stack(torch.meshgrid(x, x, indexing="xy"), -1)
    inside = (((pixel - 24.5) @ turn).abs() < 22.99).all(-1)
    found = visible(**scene, backend=backend)
    assert inside.sum() > 1700
    assert (found.faces[0][inside] >= 0).all() and (found.depths[0][inside] - 1).abs().max() < 1e-5
    outside = (((pixel - 24.5) @ turn).abs() > 23.01).any(-1)
    assert (found.faces[0][outside] == -1).all()


def test_views_chunks_and_layout_do_not_matter(backend, monkeypatch):
    scene = crumpled(2, 0.1, width=33, height=21)
    cams = [camera(33, 21, tilt=tilt, back=back) for tilt, back in ((0, 3), (1, 0.4), (2, 2.0))]
    scene |= joined(*cams)
    found = visible(**scene, backend=backend)
    for k, cam in enumerate(cams):
        alone = visible(**scene | cam, backend=backend)
        for one, all_ in zip(vars(alone).values(), vars(found).values(), strict=True):
            assert torch.equal(one[0], all_[k])
    for name in ("vertices", "viewmats", "intrinsics", "faces"):
        scene[name] = torch.stack([scene[name], scene[name] * 0], -1)[..., 0]
    monkeypatch.setattr(op, "MOST_POLYGONS", 1)
    again = visible(**scene, backend=backend)
    for one, other in zip(vars(again).values(), vars(found).values(), strict=True):
        assert torch.equal(one, other)


def test_nothing_degenerate_and_huge(backend):
    vertices, faces = ball(1)
    cam = camera(9, 5, focal=8.0)
    empty = {"vertices": vertices, "faces": faces[:0], **cam}
    behind = {"vertices": vertices, "faces": faces, **camera(9, 5, back=-5.0)}
    thin = flat([[2, 2], [8, 2], [5, 2], [1, 1], [1, 1], [1, 1], [3, 3], [3, 3], [8, 9.0]])
    for scene in (empty, behind, thin):
        found = visible(**scene, backend=backend)
        assert (found.faces == -1).all() and (found.weights == 0).all()
        assert (found.depths == torch.inf).all()
    huge = crumpled(1, 0.2, width=20, height=20)
    huge["vertices"][::3] *= 1e15
    found = visible(**huge, backend=backend)
    assert found.weights.isfinite().all() and not found.depths.isnan().any()
    leaf = vertices.clone().requires_grad_()
    assert not visible(leaf, faces, **cam, backend=backend).depths.requires_grad
    with pytest.raises(ValueError, match="faces name vertices"):
        visible(vertices, faces + 99, **cam)
