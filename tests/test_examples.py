"""The scripts of examples/ run, on embedded scenes."""

import importlib.util
import json
from pathlib import Path

from gencompress.artifact import model_path, read_artifact

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short():
    paths = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in paths] == ["ci_gate", "diffusers_user", "reconstruction_user"]
    for path in paths:
        assert len(path.read_text("utf-8").splitlines()) < 60, path.name


def test_the_reconstruction_example_and_the_gate(tmp_path, capsys):
    out = tmp_path / "scene"
    arguments = ["--steps=2", "--points=1000", "--keep=1000", f"--out={out}"]
    example("reconstruction_user").main(arguments)
    artifact = read_artifact(out / "fitted")
    assert model_path(artifact).stat().st_size > (out / "scene.sog").stat().st_size > 0
    size = next(r.after for r in artifact.measurements if r.name == "file size")
    psnr = next(r.after for r in artifact.measurements if r.name == "PSNR")
    capsys.readouterr()

    def gate(*words):
        return example("ci_gate").main([str(word) for word in words])

    for folder in (out / "report", out / "fitted"):
        assert gate(folder, "--min", psnr - 0.1, "--max-bytes", int(size)) == 0
        assert gate(folder, "--baseline", out / "fitted") == 0
        assert capsys.readouterr().out == "all is well\n" * 2
        assert gate(folder, "--min", psnr + 0.1) == 1
        assert "expected" in capsys.readouterr().out
        assert gate(folder, "--max-bytes", int(size) - 1) == 1
        assert "bytes" in capsys.readouterr().out
        assert gate(folder, "--metric", "nothing") == 1
        assert "no nothing" in capsys.readouterr().out
    rows = json.loads((out / "fitted" / "measurements.json").read_text())
    for row in rows:
        row["after"] = row["after"] - 0.5 if row["name"] == "PSNR" else row["after"]
    (out / "fitted" / "measurements.json").write_text(json.dumps(rows))
    assert gate(out / "fitted", "--baseline", out / "report") == 1
    assert "fell from" in capsys.readouterr().out
    assert gate(out / "fitted", "--baseline", out / "report", "--max-drop", 0.6) == 0


def test_the_example_for_diffusers(tmp_path, capsys):
    out = tmp_path / "drawn"
    few = ["--steps=1", "--images=2", "--latents=2", "--finetune=0", f"--out={out}"]
    example("diffusers_user").main(few)
    drawn = {path.stem: path.read_bytes() for path in out.glob("*.png")}
    assert drawn.keys() == {"plain", "half_of_the_tokens", "smaller"}
    assert len(set(drawn.values())) == 3
    assert read_artifact(out / "artifact").manifest["method"] == "prune"
