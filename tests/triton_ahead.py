"""Compiles every kernel of Triton for cards that are not here; prints what it takes as JSON.

Calls the backends' functions on tensors of the CPU, with compilation in place of the launch, so
that types and constants are those of real calls. Needs neither a device nor a driver, but a process
in which Triton does not interpret.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from gencompress_kernels import dispatch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
ARCHITECTURES = (80, 90, 120)
OPTIONS = ("num_warps", "enable_fp_fusion")
found: dict[str, dict[str, object]] = {}


def source_of(kernel, arguments, meta):
    """Types, constants and divisibility, as a launch finds them."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | {
        k: v for k, v in meta.items() if k in names
    }
    signature, constants, hints = {}, {}, {}
    for place, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name.isupper() or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, hints)


def usage_of(ptx: str, arch: int) -> dict[str, int]:
    """Registers and spills, from ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tools = triton.knobs.nvidia
        tool = tools.ptxas_blackwell if arch >= 100 else tools.ptxas
        command = [tool.path, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", str(path)]
        done = subprocess.run(
            [*command, "-o", str(path.with_suffix(".o"))],
            capture_output=True,
            text=True,
            check=True,
        )
    stores, loads = re.search(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    ).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
        "spills": int(stores) + int(loads),
    }


def compile_instead(kernel, grid, like, *arguments, **meta):
    source = source_of(kernel, arguments, meta)
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dtype == torch.int32:
            argument.fill_(1)  # numbers that the host reads
    options = {k: v for k, v in meta.items() if k in OPTIONS}
    for arch in ARCHITECTURES:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        op = kernel.fn.__module__.split(".")[1]
        key = f"{op}.{kernel.fn.__name__} {len(found)} sm_{arch}"
        found[key] = usage_of(made.asm["ptx"], arch) | {
            "cubin": len(made.asm["cubin"]),
            "shared": made.metadata.shared,
            "fused": len(re.findall(r"\bfma\.", made.asm["ptx"])),
            "flushed": made.asm["ptx"].count(".ftz"),
        }


def calls() -> None:
    """Every kernel at least once."""
    from gencompress_kernels.adam_rows import triton_ops as adam
    from gencompress_kernels.compact import triton_ops as compact
    from gencompress_kernels.composite import triton_ops as composite
    from gencompress_kernels.grouped_ffn import triton_ops as grouped
    from gencompress_kernels.hashgrid_encode import hashgrid_levels
    from gencompress_kernels.hashgrid_encode import triton_ops as hashgrid
    from gencompress_kernels.march_rays import triton_ops as march
    from gencompress_kernels.merge_splats import triton_ops as merge
    from gencompress_kernels.rownorm_colsq import triton_ops as rownorm
    from gencompress_kernels.ssim import triton_ops as ssim
    from gencompress_kernels.token_merge import triton_ops as tokens
    from gencompress_kernels.wanda_mask import triton_ops as wanda

    field = [torch.ones(64, 3) for _ in range(4)]
    for sizes, rows in (
        (torch.ones(1).double(), None),
        (torch.ones(3).double(), torch.ones(64) > 0),
    ):
        adam.forward(*field, sizes, 0.9, 0.999, 1.0, 1e-15, rows)
    for dtype in (torch.bool, torch.int16, torch.float32, torch.float64):
        compact.forward(
            [torch.ones(64, 3).to(dtype)], torch.zeros(9).long(), [torch.ones(9, 3).to(dtype)]
        )
    packed, many, few = torch.zeros(9, 2).long(), torch.ones(64), torch.ones(9)
    colors, totals = torch.ones(64, 3), (torch.ones(9, 3), few, few)
    composite.forward(many, colors, many, packed, many, 1e-4, *totals, many, few, packed[:, 0])
    composite.backward(
        torch.ones(9, 5), colors, many, packed, many, many, few, packed[:, 0], many, colors
    )
    composite.transmittance(many, many, packed, many)
    images, maps = torch.ones(2, 20, 30, 3), torch.ones(6, 20, 30, 3)
    for partials in (None, maps):
        ssim.forward(images, images, torch.ones(2), partials)
    ssim.backward(torch.ones(2), images, images, maps, images.clone())
    tokens.most_similar(
        torch.ones(2, 90, 320), torch.zeros(2, 50).long(), torch.zeros(2, 40).long()
    )
    for features, gated in ((2, True), (3, False)):
        levels = hashgrid_levels(4, features, 4, 40, log2_rows=9)
        layout = levels.scales, levels.offsets, levels.strides
        points, table = torch.ones(300, 3), torch.ones(levels.offsets[-1], features)
        logits, cells = torch.ones(5, 5, 5), torch.ones(4, 4, 4) > 0
        out = torch.ones(300, 4 * features), torch.ones(300), torch.ones(300)
        gate = (logits, cells) if gated else (None, None)
        hashgrid.forward(points, table, *gate, *layout, *out)
        results = table.clone(), logits.clone() if gated else None, points.clone()
        hashgrid.backward(*out, points, table, gate[0], *out, *layout, *results)
    rownorm.forward(torch.ones(64, 1280).bfloat16(), torch.ones(1280))
    wanda.forward(torch.ones(64, 1280), *torch.ones(2, 10, 1280), 13, 1, torch.ones(64, 1280) > 0)
    rays = torch.ones(64, 3), torch.ones(64, 3), torch.zeros(64), torch.ones(8, 8, 8) > 0
    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    for cone, contracted in ((0.0, False), (0.01, False), (0.0, True), (0.01, True)):
        march.forward(*rays, box, 0.01, cone, 0.0, 9.0, contracted, 1024)
    blobs = [torch.ones(64, n, dtype=torch.float64) for n in (3, 6, 1, 48)]
    blobs[2] = blobs[2][:, 0]
    merge.costs(merge.Blobs(*blobs), torch.zeros(99, 2).long())
    mixture(grouped, torch.bfloat16, "gelu-approximate")
    linears(grouped, torch.bfloat16)
    # without tensor cores one card is like another
    with mock.patch.object(sys.modules[__name__], "ARCHITECTURES", (90,)):
        mixture(grouped, torch.float32, "geglu")


def mixture(grouped, dtype, activation) -> None:
    """12 experts of 256 neurons, 1,024 channels, two experts a token."""
    per = 2 if activation in ("geglu", "swiglu") else 1
    x, expert = torch.ones(64, 1024, dtype=dtype), torch.zeros(64, 2).long()
    order, starts = torch.arange(128), torch.tensor([0] + [128] * 12)
    w1, w2 = (torch.ones(n * 256 * 12, 1024, dtype=dtype) for n in (per, 1))
    b1, b2 = torch.ones(len(w1), dtype=dtype), torch.ones(12, 1024, dtype=dtype)
    z, gates = torch.ones(128, per * 256, dtype=dtype), torch.ones(64, 2)
    kind = tuple(range(0, 12 * 256 + 1, 256)), activation
    grouped.forward(x, expert, gates, order, starts, w1, w2, b1, b2, *kind, z, x.clone())
    results = [t.clone() for t in (x, gates, w1, w2, b1, b2)]
    grouped.backward(x, x, expert, gates, order, starts, z, w1, w2, b1, b2, *kind, results)


def linears(grouped, dtype) -> None:
    """Of sizes that are no multiples of 16."""
    x, sizes, starts = torch.ones(64, 1024, dtype=dtype), (256, 1024, 512, 1000), [0, 40, 64]
    starts = torch.tensor(starts)
    weight = torch.ones(256 * 1024 + 512 * 1000, dtype=dtype)
    bias, y = torch.ones(768, dtype=dtype), torch.ones(64, 512, dtype=dtype)
    grouped.linear(x, starts, weight, bias, sizes, y)
    grouped.linear_backward(y, x, starts, weight, sizes, (x.clone(), weight.clone(), bias.clone()))


def splats() -> None:
    """Splats and surfels of degree 3, with all that can be asked for."""
    from gencompress_kernels.rasterize_splats import triton_ops, triton_ops_squares
    from gencompress_kernels.rasterize_splats.reference import Incoming, Shot
    from gencompress_kernels.rasterize_surfels import reference as surfels
    from gencompress_kernels.rasterize_surfels import triton_ops as surfel_ops

    gray, image, background = torch.ones(21, 27), torch.ones(21, 27, 3), torch.ones(3)
    scene = torch.ones(300, 3), torch.ones(300, 4), torch.ones(300, 3), torch.ones(300)
    scene = *scene, torch.ones(300, 16, 3), torch.eye(4), torch.eye(3), 27, 21
    shot = Shot(*scene, True)
    flat = surfels.Shot(*scene[:2], torch.ones(300, 2), *scene[3:])
    with mock.patch.object(torch, "empty", torch.zeros):  # how many tiles a splat meets: none
        *_, records, offsets, pairs = triton_ops.forward(shot, background, True)
        drawn = surfel_ops.forward(flat, background, True)
    incoming = Incoming(image, gray, gray, image, gray, gray, background)
    triton_ops.backward(shot, incoming, [records, offsets, pairs], True, True)
    pictures = drawn.pictures
    surfel_ops.backward(flat, background, pictures, pictures, list(drawn[2:]), True, True)
    for module in (triton_ops, triton_ops_squares):
        module.listed = lambda shot: (records, offsets, pairs)
    triton_ops.forward(shot, background, False)
    triton_ops.corrections(shot, image, gray)
    triton_ops_squares.squared_gradients(shot, True)


def triangles() -> None:
    from gencompress_kernels.rasterize_triangles import triton_ops

    polygons, points = torch.zeros(60, 4, dtype=torch.int32), torch.ones(99, 2)
    maps, out = torch.ones(2, 20, 30), torch.ones(60, 4, 2)
    sums, peak, extent = torch.ones(60, 2), torch.ones(60), torch.ones(60, 2)
    triton_ops.silhouettes(points, polygons, 0.4, maps.clone())
    triton_ops.silhouettes_backward(maps, maps, points, polygons, 0.4, out)
    for cull in (False, True):
        triton_ops.coverage(points, polygons, maps, 0.4, cull, sums, peak, extent)
        triton_ops.coverage_backward(sums, points, polygons, maps, 0.4, cull, out)
    winner, faces = torch.zeros(2, 20, 30, dtype=torch.int32), torch.zeros(30, 3).long()
    triton_ops.visible(points, points[:, 0].contiguous(), polygons, winner)
    lenses, weights = torch.ones(2, 3, 3), torch.ones(2, 20, 30, 3)
    triton_ops.weigh(winner, torch.ones(2, 49, 3), faces, lenses, maps, weights)


if __name__ == "__main__":
    for name in dispatch.OPS:
        if importlib.util.find_spec(f"gencompress_kernels.{name}.triton_ops"):
            __import__(f"gencompress_kernels.{name}.triton_ops")
    __import__("gencompress_kernels.rasterize_splats.triton_ops_squares")
    for name, module in list(sys.modules.items()):
        if ".triton_ops" in name:
            module.launch = compile_instead
    calls()
    splats()
    triangles()
    json.dump(found, sys.stdout, indent=1)
