"""Vertices moved so that the silhouette of a mesh fits masks; its faces stay as they are.

Works in the mesh's own frame: its middle at the origin, the diagonal of its box one unit.
Regularisers are free of scale. Steps are preconditioned by (I + stiffness L), L the graph
Laplacian: smooth moves are large and the surface does not tear, yet nothing pulls it together
("Large Steps in Inverse Rendering of Geometry", Nicolet, Jacobson and Jakob 2021).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gencompress_kernels.rasterize_triangles import silhouettes
from torch import Tensor
from torch.nn import functional

from gencompress.mesh.cleanup import boundary_loss
from gencompress.mesh.masks import MaskViews, resized
from gencompress.mesh.surface import TriMesh, face_normals
from gencompress.mesh.topology import (
    as_array,
    boundary_neighbours,
    edge_table,
    half_edges,
)
from gencompress.views.fit import Checkpoint, Log, Progress, fit, quiet, view_order

LEAST_SIZE = 32  # px, of the coarsest masks
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Settings:
    """How vertices move."""

    steps: int = 200
    rate: float = 2e-3  # of the box's diagonal: how far a vertex goes in a step, at most
    batch: int = 8  # views a step
    coarse: int = 2  # times that the masks are halved for the first steps
    sigma: float = 0.4  # px, softness of a face's edge
    holes: bool = True  # False: what a mask encloses is not compared
    stiffness: float = 20.0  # of the preconditioner; 0 is plain Adam
    laplacian: float = 0.0  # weights of the regularisers
    edge: float = 0.0
    flatten: float = 0.0
    boundary: float = 0.0
    uniform: bool = True
    decay: float = 0.3


@dataclass(frozen=True, eq=False)
class Adjacency:
    """Who is next to whom; holds for as long as the faces do."""

    edges: Tensor  # [E, 2]
    degree: Tensor  # [V, 1] edges of each vertex, 1 at least
    pairs: Tensor  # [I, 2] faces that share an edge of two faces
    rim: tuple[Tensor, Tensor]  # of topology.boundary_neighbours


def adjacency(faces: Tensor, num_vertices: int) -> Adjacency:
    edges = edge_table(faces)[0]
    degree = torch.bincount(edges.reshape(-1), minlength=num_vertices).clamp(min=1)[:, None]
    pairs = np.stack(half_edges(as_array(faces)).pairs(only_two=True), 1) // 3
    return Adjacency(edges, degree, torch.from_numpy(pairs), boundary_neighbours(faces))


def silhouette_loss(drawn: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - soft IoU, the mean over views [C, H, W]; pixels may have weights. 0 where both are empty"""
    both = drawn * masks
    either = drawn + masks - both
    if weights is not None:
        both, either = both * weights, either * weights
    return 1 - ((both.sum((1, 2)) + 1e-6) / (either.sum((1, 2)) + 1e-6)).mean()


def laplacian_loss(vertices: Tensor, near: Adjacency) -> Tensor:
    """Mean squared distance of a vertex to the mean of its neighbours, in mean squared edges."""
    a, b = near.edges.unbind(1)
    total = torch.zeros_like(vertices).index_add(0, a, vertices[b]).index_add(0, b, vertices[a])
    off = (total / near.degree - vertices).square().sum(1).mean()
    return off / (vertices[a] - vertices[b]).square().sum(1).mean().detach()


def edge_loss(vertices: Tensor, near: Adjacency) -> Tensor:
    """Variance of the edges' lengths over their squared mean."""
    a, b = vertices[near.edges].unbind(1)
    lengths = ((a - b).square().sum(1) + 1e-20).sqrt()
    return (lengths / lengths.mean() - 1).square().mean()


def flatten_loss(vertices: Tensor, faces: Tensor, near: Adjacency) -> Tensor:
    """Mean of (1 - cosine)^2 between the normals of neighbours (SoftRas); 0 where it is flat."""
    if not len(near.pairs):
        return vertices.sum() * 0
    one, other = face_normals(vertices, faces)[near.pairs].unbind(1)
    return (1 - (one * other).sum(1)).square().mean()


class Stiff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, solve: Any) -> Tensor:
        ctx.solve = solve
        return torch.from_numpy(solve(u.detach().double().numpy())).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.solve(slopes.double().numpy())).to(slopes.dtype), None


def stiff_matrix(near: Adjacency, stiffness: float) -> Any:
    from scipy.sparse import coo_matrix, diags

    edges, count = near.edges.numpy(), len(near.degree)
    both = np.concatenate([edges, edges[:, ::-1]]).T
    links = coo_matrix((np.ones(both.shape[1]), both), (count, count)).tocsr()
    degree = np.asarray(links.sum(1)).ravel()
    return (diags(1 + stiffness * degree) - stiffness * links).tocsc()


def enclosed(masks: Tensor) -> Tensor:
    """bool [C, H, W]: empty pixels that the mask encloses, with the soft rim around them."""
    from scipy import ndimage

    found = []
    for mask in masks.numpy():
        label, _ = ndimage.label(mask < 0.5)
        rim = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]])
        hole = (label > 0) & ~np.isin(label, rim)
        hole |= ndimage.binary_dilation(hole) & (mask < 1)
        found.append(torch.from_numpy(hole))
    return torch.stack(found)


def refine(
    mesh: TriMesh,
    views: MaskViews,
    settings: Settings,
    generator: torch.Generator,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Progress = quiet,
) -> tuple[TriMesh, Log]:
    original = mesh.vertices.detach().double()
    low, high = original.amin(0), original.amax(0)
    middle, unit = (low + high) / 2, float((high - low).norm())
    near = adjacency(mesh.faces, len(original))
    stages = _stages(views, middle, unit, settings)
    x = ((original - middle) / unit).float()
    solve = None
    if settings.stiffness:
        from scipy.sparse.linalg import splu

        K = stiff_matrix(near, settings.stiffness)
        solve = splu(
            K, permc_spec="MMD_AT_PLUS_A", options=dict(SymmetricMode=True), diag_pivot_thresh=0.0
        ).solve
        u = torch.from_numpy(K @ x.double().numpy()).float()
    else:
        u = x.clone()
    st = {"u": u, "m": torch.zeros_like(u), "v": torch.zeros_like(u)}

    def place(u):
        return Stiff.apply(u, solve) if solve else u

    def advance(step, generator, log):
        vm, K_, masks, weights = stages[
            min(len(stages) - 1, step * len(stages) // max(1, settings.steps))
        ]
        index = torch.tensor(
            view_order(
                step, len(vm), batch=min(settings.batch, len(vm)), seed=generator.initial_seed()
            )
        )
        u = st["u"].clone().requires_grad_()
        v = place(u)
        A = silhouettes(
            v,
            mesh.faces,
            vm[index],
            K_[index],
            masks.shape[2],
            masks.shape[1],
            sigma=settings.sigma,
        )
        out = {"iou": silhouette_loss(A, masks[index], weights[index])}
        for name, w, f in (
            ("laplacian", settings.laplacian, lambda: laplacian_loss(v, near)),
            ("edge", settings.edge, lambda: edge_loss(v, near)),
            ("flatten", settings.flatten, lambda: flatten_loss(v, mesh.faces, near)),
            ("boundary", settings.boundary, lambda: boundary_loss(v, near.rim)),
        ):
            if w:
                out[name] = w * f()
        loss = sum(out.values())
        loss.backward()
        g = u.grad
        st["m"] = st["m"] * BETAS[0] + (1 - BETAS[0]) * g
        st["v"] = st["v"] * BETAS[1] + (1 - BETAS[1]) * g * g
        mh = st["m"] / (1 - BETAS[0] ** (step + 1))
        vh = st["v"] / (1 - BETAS[1] ** (step + 1))
        if settings.uniform:
            vh = vh.max()
        t = step / settings.steps
        rate = settings.rate * (
            1 if t < 1 - settings.decay else max(0.1, (1 - t) / max(settings.decay, 1e-9))
        )
        st["u"] = st["u"] - rate * mh / (vh.sqrt() + 1e-8 * 0 + 1e-20)
        return {k: float(q) for k, q in out.items()}

    log = fit(
        advance,
        settings.steps,
        generator,
        dump=lambda: dict(st),
        load=lambda d: st.update(d),
        checkpoint=checkpoint,
        progress=progress,
    )
    with torch.no_grad():
        x = place(st["u"])
    out = x.double() * unit + middle
    return replace(mesh, vertices=out.to(mesh.vertices.dtype)), log


def _stages(views, middle, unit, settings):
    vm = views.viewmats.clone()
    vm[:, :3, 3] = (vm[:, :3, 3] + vm[:, :3, :3] @ middle) / unit
    vm = vm.float()
    longer = max(views.masks.shape[1:])
    sizes = [longer]
    for _ in range(settings.coarse):
        if sizes[0] // 2 < LEAST_SIZE:
            break
        sizes.insert(0, sizes[0] // 2)
    w = torch.ones_like(views.masks) if settings.holes else (~enclosed(views.masks)).float()
    out = []
    for s in sizes:
        v = resized(views, s)
        ww = resized(replace(views, masks=w), s).masks
        out.append((vm, v.intrinsics.float(), v.masks, ww))
    return out
