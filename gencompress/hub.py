"""Artifacts on the Hugging Face Hub, with a model card that repeats what was measured."""

from __future__ import annotations

import contextlib
import glob
import json
import re
from pathlib import Path
from typing import Any

from gencompress.artifact import Artifact, read_artifact, verify
from gencompress.files import FormatError, writing
from gencompress.report import markdown, rows
from gencompress.report.preview import read_pictures
from gencompress.run import METHODS
from gencompress.scenes import resolve

CARD = "card.md"  # of a dry run; on the hub it is the README.md
_TAGS = {
    "splat": ["gaussian-splatting", "3d"],
    "mesh": ["mesh", "3d"],
    "nerf": ["nerf", "3d"],
    "t2i": ["text-to-image", "diffusers"],
}


def push_to_hub(
    artifact: Artifact | str | Path, repo_id: str, private: bool = True, *, dry_run: bool = False
) -> str:
    """Uploads an artifact as it is, and its card. Returns the address, or where the card is.

    What the recipe names (paths of targets and data) goes along as it was given.

    Args:
        repo_id: `owner/name`; made if there is none. The login is that of `hf auth login`.
        private: of a new repository. One that is there and public is then refused.
        dry_run: only write the card, as `card.md` into the artifact's folder.

    Raises:
        FormatError: it is no artifact, or one of its files is missing or changed.
        ValueError: a repository of another form, or a public one.
    """
    if not isinstance(artifact, Artifact):
        artifact = read_artifact(artifact)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repository {repo_id!r}: expected owner/name")
    if problems := verify(artifact):
        raise FormatError(artifact.folder, "; ".join(problems))
    text = card(artifact, repo_id)
    if dry_run:
        with writing(artifact.folder / CARD, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")
        return str(artifact.folder / CARD)
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id}: is there and public; say --public, or choose another")
    api.upload_file(repo_id=repo_id, path_or_fileobj=text.encode(), path_in_repo="README.md")
    api.upload_folder(
        repo_id=repo_id,
        folder_path=artifact.folder,
        allow_patterns=[
            glob.escape(name) for name in ("manifest.json", *artifact.manifest["files"])
        ],
        commit_message=f"{artifact.manifest['title']} by gencompress",
    )
    return str(url)


def card(artifact: Artifact, repo_id: str) -> str:
    """A model card: metadata as YAML, how to use it, and the report of the artifact."""
    method = artifact.manifest["method"]
    room = METHODS[method].split(".")[1] if method in METHODS else ""
    about: dict[str, Any] = {
        "library_name": "gencompress",
        "tags": ["gencompress", method, "compression", *_TAGS.get(room, ())],
    }
    if room == "t2i":
        about["pipeline_tag"] = "text-to-image"
    base = _base_model(artifact.manifest["recipe"].get("target"))
    if base:
        about["base_model"] = base
    head = [f"{name}: {json.dumps(value)}" for name, value in about.items()]  # JSON is YAML
    described = rows.describe(artifact, artifact.folder, "a1")
    described |= {"distinction": "", "pictures": read_pictures(artifact.folder)}
    title, _, body = markdown.render(
        {"title": described["title"], "artifacts": [described], "comparison": {}}
    ).partition("\n")
    use = ["```sh", f"hf download {repo_id} --local-dir artifact", "gencompress info artifact"]
    use += ["gencompress measure artifact", "```"]
    if (artifact.folder / "model" / "model_index.json").is_file():
        use += ["", "Its folder `model` is a pipeline that plain diffusers loads."]
    parts = ["---", *head, "---", "", title, "", "## Use", "", *use, body]
    return "\n".join(parts)


def _base_model(target: Any) -> str | None:
    """The target where it is a name on the hub, no path or scene."""
    with contextlib.suppress(FileNotFoundError, FormatError):
        resolve(str(target))
        return None
    return str(target) if re.fullmatch(r"[\w.-]+/[\w.-]+", str(target)) else None
