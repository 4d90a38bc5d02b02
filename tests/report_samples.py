"""Artifacts made by hand, small enough to read."""

import json
import struct

import torch
from PIL import Image

from gencompress.mesh.shade import preview_glb

CPU = {"name": "AMD EPYC", "cores": 2, "kind": "cpu"}
FIELDS = ("name", "before", "after", "unit", "better", "repeats", "spread")
ROWS = [
    dict(zip(FIELDS, row, strict=True))
    for row in (
        ("splats", 113648, 28412, "", "lower", 1, None),
        ("file size", 27275520, 6818880, "B", "lower", 1, None),
        ("PSNR", None, 36.853, "dB", "higher", 24, 1.93),
        ("LPIPS", None, None, "", "lower", 1, None),
        ("render time", 0.0973, 0.0512, "s", "lower", 20, 0.0021),
    )
]
CURVE = {"kind": "curve", "x_name": "splats kept", "x_unit": "%", "y_name": "PSNR", "y_unit": "dB"}
LOG = [
    {**CURVE, "series": "merge", "x": 0.25, "y": 36.8, "worst": 31.2, "chosen": True},
    {**CURVE, "series": "merge", "x": 0.5, "y": 41.9, "worst": 36.1},
    {**CURVE, "series": "opacity", "x": 0.25, "y": 23.6},
    {**CURVE, "series": "opacity", "x": 0.5, "y": None},
    *({"kind": "step", "step": i, "loss": 1 / (i + 1)} for i in range(5)),
    {"kind": "note", "text": "24 views"},
]

COUNT = {"kind": "curve", "x_name": "step", "x_unit": "", "y_name": "splats", "y_unit": ""}
FIT_ROWS = [
    dict(zip(FIELDS, row, strict=True))
    for row in (
        ("file size", None, 634302, "B", "lower", 1, None),
        ("splats", None, 6093, "splats", "lower", 1, None),
        ("PSNR, worst view", None, 15.36, "dB", "higher", 13, None),
        ("PSNR", None, 17.37, "dB", "higher", 13, 1.28),
        ("render time", None, 0.0038, "s", "lower", 13, 0.0001),
        ("fitting time", None, 8.37, "s", "lower", 1, None),
    )
]

MESH_ROWS = [
    dict(zip(FIELDS, row, strict=True))
    for row in (
        ("file size", 128420, 117604, "B", "lower", 1, None),
        ("vertices", 2562, 2346, "", "lower", 1, None),
        ("faces", 5120, 4688, "faces", "lower", 1, None),
        ("Chamfer distance, L1", 0.0412, 0.0131, "", "lower", 1, None),
        ("silhouette IoU, worst view", 0.741, 0.962, "", "higher", 8, None),
        ("silhouette IoU", 0.853, 0.981, "", "higher", 8, 0.004),
        ("F-score at 1%", 61.0, 83.5, "%", "higher", 1, None),
        ("normal consistency", 0.88, 0.93, "", "higher", 1, None),
        ("Euler characteristic", 2, 0, "", "lower", 1, None),
        ("genus", 0, 0, "", "higher", 1, None),
        ("boundary loops", 1, 5, "", "higher", 1, None),
        ("scoring time", None, 0.61, "s", "lower", 1, None),
    )
]
# A cube of edge 1 around CENTRE: the corners of its six sides, counter-clockwise from outside, and
# their colours. The side towards -z, where the camera is, comes first: only depth keeps it there.
CENTRE = (2.0, 1.0, -1.0)
CUBE = [[x, y, z] for z in (-1.5, -0.5) for y in (0.5, 1.5) for x in (1.5, 2.5)]
SIDES = [(0, 2, 3, 1), (4, 5, 7, 6), (0, 4, 6, 2), (1, 3, 7, 5), (0, 1, 5, 4), (2, 6, 7, 3)]
COLOURS = [(250, 40, 40), (40, 250, 40), (40, 40, 250), (240, 240, 40), (40, 240, 240), (240,) * 3]


def cube_glb(path, sides=range(6), colours=COLOURS):
    """The cube with some of its sides, two triangles each."""
    corners = [SIDES[i] for i in sides]
    faces = [f for a, b, c, d in corners for f in ((a, b, c), (a, c, d))]
    tints = torch.tensor([colours[i] for i in sides for _ in range(2)], dtype=torch.uint8)
    preview_glb(path, torch.tensor(CUBE), torch.tensor(faces), tints, overwrite=True)


def make_mesh(folder, **more):
    """An artifact of the mesh method: a cube, the cube without its front, and what was removed."""
    recipe = {"method": "mesh", "target": "cube.obj", "budget": "units", "seed": 0}
    given = {"measurements": MESH_ROWS, "views": 2, "recipe": recipe, "title": "cube"} | more
    make_artifact(folder, method="mesh", **given)
    preview = folder / "preview"
    cube_glb(preview / "before.glb")
    cube_glb(preview / "after.glb", range(1, 6))
    cube_glb(preview / "removed.glb", colours=[(120, 0, 40)] + [(205, 205, 202)] * 5)
    index = json.loads((preview / "index.json").read_text())
    for view in index["views"]:
        view["legend"] = "blue is missing, orange lies outside"
    labels = {"before": "original", "after": "pruned", "difference": "mask over render"}
    index |= {"labels": labels | {"removed": "removed faces"}}
    index["camera"] = {"eye": [2, 1, -4], "target": CENTRE, "up": [0, -1, 0], "fov_deg": 45}
    index["scene"] = {"background": "black", "legend": "dark red was removed"}
    (preview / "index.json").write_text(json.dumps(index))
    return folder


def fit_log(policy):
    """Density control that grows from 5,000 splats to 6,093 and falls to 5,900."""
    events = [("split", 50, 430, 5430), ("clone", 100, 3, 5433), ("split", 100, 660, 6093)]
    events.append(("prune", 150, 193, 5900))
    names = ("event", "step", "count", "splats")
    rows = [{"kind": "density", **dict(zip(names, e, strict=True))} for e in events]
    rows += [{"kind": "step", "step": i, "loss": 1 / i} for i in (100, 200)]
    counts = [(0, 5000), *((step, splats) for _, step, _, splats in events), (200, 5900)]
    return rows + [{**COUNT, "series": policy, "x": x, "y": y} for x, y in counts]


def make_fit(folder, policy="default", *, log=None, **more):
    """An artifact of `fit`: photos before, and one cloud."""
    recipe = {"method": "splat", "verb": "fit", "target": "lego", "seed": 0}
    recipe |= {"budget": {"keep": "100%"}, "config": {"policy": policy}}
    scene = {"after": [splat((0, 0, 0), (1, 1, 1), (255, 0, 0, 255))]}
    given = {"measurements": FIT_ROWS, "views": 2, "scene": scene, "recipe": recipe} | more
    make_artifact(folder, log=fit_log(policy) if log is None else log, title="lego", **given)
    path = folder / "preview" / "index.json"
    labels = {"before": "photo", "after": "fitted"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    return folder


def splat(xyz, scale, rgba, rot=(255, 128, 128, 128)):
    return struct.pack("<6f8B", *xyz, *scale, *rgba, *rot)


def make_artifact(folder, *, measurements=ROWS, log=(), views=0, scene=None, **manifest):
    folder.mkdir(parents=True)
    recipe = {"method": "splat", "target": "plant.splat", "budget": "25%", "seed": 0}
    recipe["config"] = {"score": "blend_weight", "steps": None}
    known = {
        "format": 1,
        "method": "splat",
        "title": "plant, 25%",
        "created": "2026-01-02T03:04:05",
    }
    known |= {"gencompress": "0.1.0", "recipe": recipe, "packages": {"torch": "2.13.0"}}
    known |= {"commit": "c0ffee", "device": CPU, "backends": {"rasterize_splats": "cpu"}}
    known |= {"model": {"file": "model/scene.ply"}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(known | manifest))
    (folder / "measurements.json").write_text(json.dumps(measurements))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    preview = folder / "preview"
    preview.mkdir()
    index = {"views": []}
    for i in range(views):
        view = {"name": f"view {i + 1}", "caption": "PSNR 41.2 dB", "background": "black"}
        for key, colour in (("before", "red"), ("after", "blue"), ("difference", "grey")):
            view[key] = f"view-{i}-{key}.png"
            Image.new("RGB", (200, 160), colour).save(preview / view[key])
        index["views"].append(view)
    if scene:
        camera = {"eye": [0, 0, -3], "target": [0, 0, 0], "up": [0, -1, 0], "fov_deg": 45}
        index["camera"] = camera
        for key, records in scene.items():
            (preview / f"{key}.splat").write_bytes(b"".join(records))
    (preview / "index.json").write_text(json.dumps(index))
    return folder
