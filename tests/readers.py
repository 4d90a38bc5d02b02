"""Every reader of files from elsewhere, with small whole files to damage. See damage.py."""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from mesh import mesh_scenes
from mesh.glb_samples import Builder, square
from mesh.mesh_samples import torus
from PIL import Image
from report_samples import make_artifact, splat
from safetensors.torch import save_file
from splat.scene_samples import ball
from views.conftest import write_colmap, write_transforms

from gencompress.artifact import read_artifact, read_log, read_masks, read_scores, verify
from gencompress.core.mask import Compressed, Mask
from gencompress.files import FormatError
from gencompress.recipe import RecipeError, config_from, read_recipe, to_dict
from gencompress.views.rig import fibonacci_rig

MEMORY = 512 << 20  # bytes, far above what any of the small files needs
SECONDS = 20  # of the processor, likewise


@dataclass(frozen=True)
class Reader:
    make: Callable[[Path], object]  # writes whole files into a new folder
    read: Callable[[Path], object]  # what is in that folder
    files: tuple[str, ...]  # those that are damaged, one at a time
    raises: tuple[type[Exception], ...] = (FormatError,)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """No more memory than there was and MEMORY, and no more than SECONDS: MemoryError or
    TimeoutError else."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    if (used := Path("/proc/self/statm")).is_file():  # elsewhere memory has no limit that holds
        pages = int(used.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def attempt(reader: Reader, folder: Path) -> str:
    """Reads the folder within limits: "read", or the name of the documented error that came.

    Raises whatever else comes, and AssertionError where memory ran out and an error hid it."""
    try:
        with limited():
            reader.read(folder)
    except reader.raises as problem:
        seen: BaseException | None = problem
        while seen is not None:
            assert not isinstance(seen, MemoryError | TimeoutError), f"{seen!r} behind {problem}"
            seen = seen.__cause__ or seen.__context__
        return type(problem).__name__
    return "read"


# splats


def _splat(name: str, **more: object) -> Reader:
    formats = importlib.import_module("gencompress.splat.formats")

    def read(folder: Path) -> None:
        cloud = formats.read(folder / name)
        assert len(cloud) and all(t.isfinite().all() for t in (cloud.means, cloud.scales, cloud.sh))
        formats.describe(folder / name)

    path = "a/meta.json" if name == "a" else name
    return Reader(
        lambda folder: formats.write(folder / path, ball(40), **more), read,
        ("a/meta.json", "a/means_l.webp", "a/shN_centroids.webp") if name == "a" else (name,),
    )  # fmt: skip


# meshes


def _mesh(name: str, make: Callable[[Path], object]) -> Reader:
    formats = importlib.import_module("gencompress.mesh.formats")

    def read(folder: Path) -> None:
        mesh = formats.read(folder / name)
        assert len(mesh) and mesh.vertices.isfinite().all()
        assert 0 <= int(mesh.faces.min()) <= int(mesh.faces.max()) < len(mesh.vertices)
        formats.describe(folder / name)
        with contextlib.suppress(ValueError):  # what the format cannot hold
            formats.write(folder / f"again{Path(name).suffix}", mesh, overwrite=True)

    return Reader(make, read, (name,))


def _written(name: str) -> Callable[[Path], object]:
    formats = importlib.import_module("gencompress.mesh.formats")
    return lambda folder: formats.write(folder / name, torus(5, 6))


OBJ = """# a square
mtllib a.mtl
o thing
v 0 0 0 1 0 0
v 1 0 0 0 1 0
v 1 1 0 0 0 1
v 0 1 0 1 1 1
vt 0 0
vt 1 0
vt 1 1
vn 0 0 1
usemtl wood
s 1
f 1/1/1 2/2/1 3/3/1 4/1/1
g other
f -4//1 -3//1 -2//1
l 1 2
"""
PLY = """ply
format ascii 1.0
comment TextureFile a.png
element vertex 4
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face 2
property list uchar int vertex_indices
property list uchar float texcoord
property int part
element note 1
property double weight
end_header
0 0 0 255 0 0
1 0 0 0 255 0
1 1 0 0 0 255
0 1 0 9 9 9
4 0 1 2 3 8 0 0 1 0 1 1 0 1 1
3 0 1 2 0 2
0.5
"""
STL = """solid a
facet normal 0 0 1
outer loop
vertex 0 0 0
vertex 1 0 0
vertex 0 1 1e-3
endloop
endfacet
endsolid a
"""


def _glb(folder: Path) -> None:
    builder = Builder(
        images=[{"uri": "skin.png"}, {"bufferView": 0, "mimeType": "image/png"}],
        textures=[{"source": 0}],
        materials=[{"name": "glass"}, {"name": "wood"}],
    )
    builder.view(b"pretend png!!")
    first = square(builder, material=1)
    moved = builder.array(np.eye(4, 3), "f4", min=[0] * 3, max=[1] * 3)
    first["targets"] = [{"POSITION": moved}]
    mesh = builder.mesh(first, name="thing", weights=[0.5])
    builder.root["nodes"] = [
        {"children": [1, 2], "translation": [0, 0, 5]},
        {"mesh": mesh, "rotation": [0, 0.6, 0, 0.8], "scale": [0.7, 1.9, 0.3]},
        {"mesh": builder.mesh(square(builder)), "skin": 0},
    ]
    builder.root["skins"] = [
        {"joints": [0], "inverseBindMatrices": builder.array([np.eye(4)], "f4")}
    ]
    builder.write(folder / "a.glb")


# fields


def _field(storage: str, bits: int) -> Reader:
    from nerf.nerf_samples import make_field

    from gencompress.nerf import formats

    def make(folder: Path) -> None:
        formats.write(folder / "a.safetensors", make_field(storage, bits))

    def read(folder: Path) -> None:
        formats.is_field(folder / "a.safetensors")
        formats.describe(folder / "a.safetensors")

    return Reader(make, read, ("a.safetensors",))


# captures


def _cameras() -> list:
    rig = fibonacci_rig((0.5, -1.0, 2.0), 1.0, 5, width=24, height=16)
    lens = {"fx": 20.0, "fy": 21.0, "cx": 11.0, "cy": 8.5}
    return [
        replace(camera, name=f"{i:04d}.png", distortion=(0.05, -0.02, 0.001, -0.002), **lens)
        for i, camera in enumerate(rig)
    ]


def _capture(folder: Path) -> None:
    write_transforms(folder, _cameras())
    xyz = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez_compressed(folder / "points3d.npz", xyz=xyz, rgb=xyz.astype(np.uint8))


def _colmap(text: bool) -> Callable[[Path], None]:
    points = np.random.default_rng(0).normal(size=(10, 3))
    return lambda folder: write_colmap(folder, _cameras(), points, text=text)


def _read_capture(folder: Path) -> None:
    from gencompress.views.loaders import load_points, load_split
    from gencompress.views.photos import load_photos

    cameras = [camera for part in load_split(folder) for camera in part]
    assert all(camera.world_to_camera.isfinite().all() for camera in cameras)
    with contextlib.suppress(ValueError):  # a distortion that cannot be undone
        load_photos(cameras[1:2])
    found = load_points(folder)
    assert found is None or np.isfinite(found[0]).all()


def _masks(folder: Path) -> None:
    rig = mesh_scenes.rig(4, 16)
    mesh_scenes.write_npz(folder / "masks.npz", mesh_scenes.ball_masks(rig), "opencv")


def _read_masks(folder: Path) -> None:
    from gencompress.mesh.masks import load_masks

    for views in load_masks(folder / "masks.npz", every=2):
        assert views.viewmats.isfinite().all() and views.intrinsics.isfinite().all()


# recipes, scenes, artifacts

RECIPE = """method = "splat"
verb = "compress"
target = "scenes/spheres"
seed = 3
device = "cpu"
data = { views = "photos" }

[budget]
keep = "50% bytes"
floor = 2

[config]
score = "blend_weight"
num_views = 8
size = 128
compare = ["opacity", "random"]
curve = [0.25, 0.5]
up = [0.0, 0.0, 1.0]
"""


def _read_recipe(folder: Path) -> None:
    from gencompress.splat import Config

    recipe = read_recipe(folder / "a.toml", ["budget.keep=40%", "seed=0x10"])
    to_dict(recipe)
    config_from(Config, recipe.config)


def _scene(folder: Path) -> None:
    (folder / "scene.toml").write_text('kind = "splat"\nfile = "a.ply"\nviews = "b"\ntruth = "c"\n')
    (folder / "a.ply").write_bytes(b"ply\n")


def _read_scene(folder: Path) -> None:
    from gencompress.scenes import scene

    found = scene(folder / "scene.toml")
    assert (folder / found["file"]).is_file() or found["kind"] != "splat"


def _artifact(folder: Path) -> None:
    from gencompress.artifact import write_artifact
    from gencompress.measure import Measurement
    from gencompress.recipe import from_dict

    keep = torch.arange(19) % 3 == 0
    masks = {"main": Mask({"splats": keep, "heads": torch.ones(2, 4, dtype=torch.bool)})}
    log = [{"step": 0, "loss": 0.5, "kept": {"a": [1, 2]}}]
    (folder / "a.toml").write_text(RECIPE)
    write_artifact(
        folder / "r",
        from_dict({"method": "splat", "target": "a.ply", "budget": "50%"}),
        Compressed(None, masks, {"splats": torch.linspace(0, 1, 19)}, log),
        [Measurement("PSNR", None, 31.25, "dB", "higher", repeats=3, spread=0.5)],
        save_model=lambda model: (model / "scene.ply").write_bytes(b"ply\nend"),
    )


def _read_artifact(folder: Path) -> None:
    artifact = read_artifact(folder / "r")
    verify(artifact)
    read_masks(artifact)
    read_scores(artifact)
    read_log(artifact)


def _reported(folder: Path) -> None:
    scene = {"after": [splat((0, 0, 0), (1, 1, 1), (255, 0, 0, 255))]}
    make_artifact(folder / "r", views=2, scene=scene)


def _report(folder: Path) -> None:
    from gencompress.report import write_report

    write_report([folder / "r"], folder, overwrite=True)


# what the text-to-image methods read


def _pictures(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((6, 8, 4), 99, np.uint8)).save(folder / name)
    names = ("file_name", "text", "type", "role")
    table = (("a.png", "a red cat", "VM", "target"), ("b.png", 'a "blue", cup', "", "control"))
    rows = [dict(zip(names, row, strict=True)) for row in table]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [",".join(names), "a.png,a red cat,VM,target", 'b.png,"a ""blue"", cup",,control']
    (folder / "pairs.csv").write_text("\n".join(lines))
    (folder / "prompts.csv").write_text('caption,other\na cat,1\n"a, b",2\n')
    (folder / "prompts.txt").write_text("a cat\n\na dog\n")


def _captions(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from gencompress.t2i.data.captioned import images, load_captions
        from gencompress.t2i.dori.pairs import load_pairs

        images(load_captions(folder / name), 8)
        load_pairs(folder / name)

    return read


def _prompts(folder: Path) -> None:
    from gencompress.t2i.inputs import read_prompts

    for name in ("prompts.csv", "prompts.txt"):
        read_prompts(folder / name)


def _pipeline(folder: Path) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    texts = {
        "model_index.json": index,
        "unet/config.json": {"sample_size": 8, "cut": {"a": 3}},
        "vae/config.json": {"block_out_channels": [8, 8], "sample_size": 64},
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
        "vae/diffusion_pytorch_model.safetensors.index.json": {
            "weight_map": {"b": "w.safetensors"}
        },
    }
    for name, values in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    save_file({"a": torch.ones(3, 2), "n": torch.ones(2, dtype=torch.int64)},
              folder / "unet" / "diffusion_pytorch_model.safetensors")  # fmt: skip
    save_file({"b": torch.ones(2, dtype=torch.float16)}, folder / "vae" / "w.safetensors")


def _describe(folder: Path) -> None:
    from gencompress.t2i.formats import describe

    describe(folder)


def _memory_mask(folder: Path) -> None:
    from gencompress.t2i.dori import masks

    mask = Mask({"unet.a": torch.arange(30).view(5, 6) % 4 > 0, "unet.b": torch.arange(9) > 2})
    about = {"format": masks.FORMAT, "method": "nemo", "settings": {"rho": 0.1}, "model": "m",
             "prompts": "p", "num_prompts": 2}  # fmt: skip
    masks.save_mask(folder / "mask.safetensors", mask, about)


def _read_memory_mask(folder: Path) -> None:
    from gencompress.t2i.dori.masks import num_removed, read_mask

    num_removed(read_mask(folder / "mask.safetensors")[0])


def _neurons(folder: Path) -> None:
    table = torch.tensor([[0, 2, 4], [1, 3, -1]], dtype=torch.int32)
    save_file({"a": table, "b": table.clone()}, folder / "n.safetensors", {"format": "pt"})


def _read_neurons(folder: Path) -> None:
    from gencompress.t2i.dense2moe.lora import read_neurons

    read_neurons(folder / "n.safetensors")


def _encoder() -> object:
    from gencompress.t2i.aptp.encoder import PromptEncoder

    def model(input_ids: torch.Tensor, **_: object) -> object:
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 4))

    model.device = torch.device("cpu")
    return PromptEncoder("e", 4, 9, lambda texts, **_: {"input_ids": [[1, 2]] * len(texts)}, model)


def _router(folder: Path) -> None:
    from gencompress.t2i.aptp.architecture import Codes, Predictor
    from gencompress.t2i.aptp.layout import Layout, Slice
    from gencompress.t2i.aptp.router import Router, save_router

    layout = Layout((Slice("a", "head", 4, 1), Slice("b", "group", 8)), ("x", "y"), (1, 0))
    save_router(Router(_encoder(), layout, Predictor(4, layout), Codes(3, layout)), folder)


def _read_router(folder: Path) -> None:
    from gencompress.t2i.aptp.router import load_router, route

    assert 0 <= int(route(load_router(folder, _encoder()), ["a cat"])) < 3


def _settings(folder: Path) -> None:
    from gencompress.t2i.optiprune import settings

    made = settings.OptiPruned(
        SimpleNamespace(unet=SimpleNamespace(dtype=torch.float32)),
        settings.Config(), 0.5, 64, None, str(folder), "i",
    )  # fmt: skip
    settings.write(made, folder)


def _read_settings(folder: Path) -> None:
    from gencompress.t2i.optiprune import settings

    with mock.patch.object(settings, "load_pipeline", side_effect=FileNotFoundError("gone")):
        settings.read(folder)


def _latents(folder: Path) -> None:
    from gencompress.t2i.data import cache

    save_file({"latents": torch.ones(2, 3).half()}, folder / "c.safetensors", {cache.DIGEST: "d"})


def _read_latents(folder: Path) -> None:
    from gencompress.t2i.data import cache

    cache._cached(folder / "c.safetensors", "d", lambda: {"latents": torch.ones(2, 3)})


def _preparation(folder: Path) -> None:
    values = {"do_resize": True, "size": {"shortest_edge": 224}, "crop_size": 224,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def _read_preparation(folder: Path) -> None:
    from gencompress.measure.preparation import read_preparation

    found = read_preparation(folder)
    assert np.isfinite(found.mean + found.deviation).all() and min(found.size) > 0


def _sprites(folder: Path) -> None:
    pictures = np.full((2, 6, 6, 3), 255, np.uint8)
    pictures[:, 2:4, 2:4] = 30
    np.savez(folder / "emoji64.npz", images=pictures)
    lines = ["style,name,short_name,group,split", "a,b,c,d,train", "a,b,c,d,test"]
    (folder / "emoji64_captions.csv").write_text("\n".join(lines))


def _read_sprites(folder: Path) -> None:
    from gencompress.t2i.data.emoji import read_sprites

    read_sprites(folder)


# checkpoints


def _walk(folder: Path) -> None:
    from gencompress.views.fit import Checkpoint, fit

    place = torch.zeros(2)

    def load(state: dict[str, torch.Tensor]) -> None:
        # what a state holds is for those who made it: another shape is not theirs
        place.copy_(state["place"].reshape(2))

    with contextlib.suppress(KeyError):  # of `load`
        fit(
            lambda step, generator, log: {"loss": float(place.add_(1).sum())}, 4,
            torch.Generator().manual_seed(0), dump=lambda: {"place": place}, load=load,
            checkpoint=Checkpoint(folder / "fit.safetensors", "same", 2),
        )  # fmt: skip


def _train(folder: Path) -> None:
    from gencompress.t2i import checkpoint

    state = checkpoint.State(3, [{"step": 3, "loss": 0.5}], {"loss": [0.5, 1]}, 1.5)
    tensors = {"model/a": torch.ones(2), "moment/a": torch.ones(2)}
    checkpoint.save(folder / "checkpoint.safetensors", {"rate": 0.1}, state, tensors,
                    torch.Generator().manual_seed(0))  # fmt: skip


def _resume(folder: Path) -> None:
    from gencompress.t2i import checkpoint

    checkpoint.resume(folder / "checkpoint.safetensors", {"rate": 0.1}, {"model/a": torch.ones(2)},
                      torch.Generator())  # fmt: skip


def _text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


READERS: dict[str, Reader] = {
    **{name: _splat(name) for name in ("a.ply", "a.compressed.ply", "a.splat", "a.spz", "a.sog")},
    "spz version 4": _splat("b.spz", spz_version=4),
    "splats glb": _splat("c.glb"),
    "sog folder": _splat("a"),
    "obj": _mesh("m.obj", _text("m.obj", OBJ)),
    "ascii ply": _mesh("m.ply", _text("m.ply", PLY)),
    "ascii stl": _mesh("m.stl", _text("m.stl", STL)),
    "mesh ply": _mesh("n.ply", _written("n.ply")),
    "stl": _mesh("n.stl", _written("n.stl")),
    "glb": _mesh("a.glb", _glb),
    "field compact": _field("compact", 16),
    "field quant": _field("quant", 4),
    "transforms": Reader(_capture, _read_capture,
                         ("transforms.json", "points3d.npz", "images/0001.png")),
    "colmap bin": Reader(_colmap(False), _read_capture, tuple(
        f"sparse/0/{name}.bin" for name in ("cameras", "images", "points3D"))),
    "colmap txt": Reader(_colmap(True), _read_capture, tuple(
        f"sparse/0/{name}.txt" for name in ("cameras", "images", "points3D"))),
    "masks npz": Reader(_masks, _read_masks, ("masks.npz",)),
    "recipe": Reader(_text("a.toml", RECIPE), _read_recipe, ("a.toml",), (RecipeError,)),
    "scene": Reader(_scene, _read_scene, ("scene.toml",)),
    "artifact": Reader(_artifact, _read_artifact, (
        "r/manifest.json", "r/measurements.json", "r/log.jsonl", "r/masks.safetensors",
        "r/scores.safetensors")),
    "report": Reader(_reported, _report, (
        "r/manifest.json", "r/measurements.json", "r/log.jsonl", "r/preview/index.json")),
    "captions": Reader(_pictures, _captions("metadata.jsonl"), ("metadata.jsonl", "a.png")),
    "pairs": Reader(_pictures, _captions("pairs.csv"), ("pairs.csv",)),
    "prompts": Reader(_pictures, _prompts, ("prompts.csv", "prompts.txt")),
    "pipeline": Reader(_pipeline, _describe, (
        "model_index.json", "unet/config.json", "vae/config.json",
        "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json")),
    "mask of memories": Reader(_memory_mask, _read_memory_mask, ("mask.safetensors",)),
    "neurons": Reader(_neurons, _read_neurons, ("n.safetensors",)),
    "router": Reader(_router, _read_router, ("router.json", "router.safetensors"),
                     (FormatError, ValueError)),
    "optiprune": Reader(_settings, _read_settings, ("optiprune.json",),
                        (FormatError, FileNotFoundError)),
    "cache": Reader(_latents, _read_latents, ("c.safetensors",)),
    "preparation": Reader(_preparation, _read_preparation, ("preprocessor_config.json",)),
    "sprites": Reader(_sprites, _read_sprites, ("emoji64.npz", "emoji64_captions.csv")),
    "fit checkpoint": Reader(_walk, _walk, ("fit.safetensors",)),
    "train checkpoint": Reader(_train, _resume, ("checkpoint.safetensors",)),
}  # fmt: skip


def make(reader: Reader, folder: Path) -> dict[str, bytes]:
    """The whole files of a reader in a new folder, read once; those to be damaged, by name."""
    folder.mkdir(parents=True)
    reader.make(folder)
    whole = {name: (folder / name).read_bytes() for name in reader.files}
    outcome = attempt(reader, folder)
    assert outcome == "read" or reader.raises[-1:] == (FileNotFoundError,), outcome
    return whole


def damage(reader: Reader, folder: Path, name: str, data: bytes) -> str:
    """What comes of a folder with this in place of one of its files, which is put back after."""
    path = folder / name
    whole = path.read_bytes()
    try:
        path.write_bytes(data)
        return attempt(reader, folder)
    finally:
        path.write_bytes(whole)
