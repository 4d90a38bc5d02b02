"""Model cards, and what would be uploaded; the hub is a stand-in."""

import json
import re
import types

import huggingface_hub
import pytest
import yaml
from splat.scene_samples import ball

import gencompress
from gencompress import hub, run
from gencompress.artifact import read_artifact
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.recipe import Recipe
from gencompress.splat.formats import write_splats


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_splats(folder / "a.ply", ball(40))
    settings = {"num_views": 2, "size": 32, "score": "opacity", "correct": False}
    run.run(Recipe("splat", str(folder / "a.ply"), parse_budget("50%"), {}, settings), folder / "r")
    return folder / "r"


@pytest.fixture
def api(monkeypatch):
    """A hub that notes calls; `public` are the repositories that are there and public."""
    calls, public = [], set()

    class Api:
        def create_repo(self, repo_id, **how):
            calls.append(("create_repo", repo_id, how))
            return f"https://huggingface.co/{repo_id}"

        def repo_info(self, repo_id):
            return types.SimpleNamespace(private=repo_id not in public)

        def upload_file(self, **how):
            calls.append(("upload_file", how.pop("repo_id"), how))

        def upload_folder(self, **how):
            calls.append(("upload_folder", how.pop("repo_id"), how))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return types.SimpleNamespace(calls=calls, public=public)


def front(text):
    """The metadata of a card as YAML reads it, and the rest."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", text, re.S)
    return yaml.safe_load(found[1]), found[2]


def test_a_card_repeats_the_measurements(made):
    artifact = read_artifact(made)
    about, body = front(hub.card(artifact, "me/smaller"))
    assert about == {
        "library_name": "gencompress",
        "tags": ["gencompress", "splat", "compression", "gaussian-splatting", "3d"],
    }
    assert body.lstrip().startswith("# a.ply, splat") and "hf download me/smaller" in body
    table = {line.split(" | ")[0].strip("| "): line for line in body.splitlines()}
    for row in artifact.measurements:
        assert row.name in table, row.name
    assert "| 40 | 20 |" in table["splats"]
    assert re.search(r'score += "opacity"', body)  # of the recipe


@pytest.mark.parametrize(
    ("method", "target", "base"),
    [
        ("prune", "CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
        ("prune", "tiny-sd", None),
        ("prune", "/models/sd", None),
        ("prune", "models/sd/1", None),
        ("splat", "scenes/still_life", None),
    ],
)
def test_the_base_model_is_a_name_on_the_hub(made, method, target, base):
    artifact = read_artifact(made)
    artifact.manifest["method"] = method
    artifact.manifest["recipe"]["target"] = target
    about, _ = front(hub.card(artifact, "me/x"))
    assert about.get("base_model") == base
    assert about.get("pipeline_tag") == ("text-to-image" if method == "prune" else None)
    assert ("diffusers" in about["tags"]) == (method == "prune")


def test_a_dry_run_writes_the_card_and_asks_nobody(made, call, api):
    code, out, _ = call("push", made, "me/smaller", "--dry-run")
    path = made / "card.md"
    assert code == 0 and str(path) in out and api.calls == []
    assert path.read_text() == hub.card(read_artifact(made), "me/smaller")
    path.unlink()


def test_what_is_uploaded(made, api):
    (made / "notes.txt").write_text("mine")
    assert gencompress.push_to_hub(made, "me/smaller") == "https://huggingface.co/me/smaller"
    (made / "notes.txt").unlink()
    assert [(name, repo) for name, repo, _ in api.calls] == [
        *(("create_repo", "me/smaller"), ("upload_file", "me/smaller")),
        ("upload_folder", "me/smaller"),
    ]
    made_how, file_how, folder_how = (how for _, _, how in api.calls)
    assert made_how == {"private": True, "exist_ok": True}
    assert file_how["path_in_repo"] == "README.md"
    assert file_how["path_or_fileobj"].decode() == hub.card(read_artifact(made), "me/smaller")
    files = json.loads((made / "manifest.json").read_text())["files"]
    assert set(folder_how["allow_patterns"]) == {"manifest.json", *files}
    assert folder_how["folder_path"] == made


def test_nothing_private_goes_public(made, api, call):
    api.public.add("me/open")
    code, _, err = call("push", made, "me/open")
    assert code == 1 and "public" in err
    assert [name for name, *_ in api.calls] == ["create_repo"]
    code, out, _ = call("push", made, "me/open", "--public")
    assert code == 0 and "https://huggingface.co/me/open" in out
    assert api.calls[1][2] == {"private": False, "exist_ok": True}
    assert api.calls[-1][0] == "upload_folder"


def test_what_is_refused(made, api, tmp_path):
    for name in ("smaller", "me/you/it", "me/", "a b/c"):
        with pytest.raises(ValueError, match="owner/name"):
            hub.push_to_hub(made, name)
    with pytest.raises(FormatError, match="not an artifact"):
        hub.push_to_hub(tmp_path, "me/x")
    whole = (made / "log.jsonl").read_text()
    (made / "log.jsonl").write_text("{}\n")
    with pytest.raises(FormatError, match="log.jsonl: changed"):
        hub.push_to_hub(made, "me/x")
    (made / "log.jsonl").write_text(whole)
    assert api.calls == []
