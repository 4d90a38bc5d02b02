"""Compiles every kernel of Triton for cards that are not here; prints what it takes as JSON.

Calls the backends' functions on tensors of the CPU, with compilation in place of the launch, so
that types and constants are those of real calls. Needs neither a device nor a driver, but a process
in which Triton does not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
ARCHITECTURES = (80, 90)
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
        tool = triton.knobs.nvidia.ptxas.path
        command = [tool, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", str(path)]
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
    options = {k: v for k, v in meta.items() if k == "num_warps"}
    for arch in ARCHITECTURES:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        op = kernel.fn.__module__.split(".")[1]
        key = f"{op}.{kernel.fn.__name__} {len([k for k in found if k.startswith(op)])} sm_{arch}"
        found[key] = usage_of(made.asm["ptx"], arch) | {"cubin": len(made.asm["cubin"])}


def calls() -> None:
    """Every kernel at least once."""
    from gencompress_kernels.adam_rows import triton_ops as adam
    from gencompress_kernels.compact import triton_ops as compact
    from gencompress_kernels.composite import triton_ops as composite
    from gencompress_kernels.hashgrid_encode import hashgrid_levels
    from gencompress_kernels.hashgrid_encode import triton_ops as hashgrid
    from gencompress_kernels.ssim import triton_ops as ssim
    from gencompress_kernels.token_merge import triton_ops as tokens

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


if __name__ == "__main__":
    for name in ("adam_rows", "compact", "composite", "hashgrid_encode", "ssim", "token_merge"):
        __import__(f"gencompress_kernels.{name}.triton_ops")
    for name, module in list(sys.modules.items()):
        if name.endswith(".triton_ops"):
            module.launch = compile_instead
    calls()
    json.dump(found, sys.stdout, indent=1)
