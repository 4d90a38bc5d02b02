"""What a run may be given beside prompts: a router that was learnt before, and paraphrases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencompress.files import FormatError
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.paraphrase import paraphrases, read_paraphrases
from gencompress.t2i.aptp.routed import ROUTER, encoder_of
from gencompress.t2i.aptp.router import ABOUT, Router, load_router
from gencompress.t2i.aptp.settings import Config
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser

KNOWN = ("router", "paraphrases")  # names of --data


@dataclass(frozen=True, eq=False)
class Given(Inputs):
    """The inputs of a run of APTP."""

    router: Router | None = None  # of a run that is finished: codes and router are not learnt anew
    said_alike: tuple[tuple[str, ...], ...] = ()  # of a file: groups, their prompt first

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Texts that mean the same, the prompt first: those of the file, or of every held-out
        prompt its `paraphrases`."""
        own = dict.fromkeys(self.wanted.prompts)
        return self.said_alike or tuple((prompt, *paraphrases(prompt)) for prompt in own)


def given(pipe: Any, inputs: Inputs, data: dict[str, str], config: Config) -> Given:
    """Inputs with what `data` names of KNOWN.

    Raises:
        FormatError: a file is not what it should be.
        ValueError: a router of another encoder, of another denoiser, or of another number of
            experts.
    """
    router = None
    if "router" in data:
        encoder = encoder_of(pipe, config.encoder, denoiser(pipe)[0].device)
        router = load_router(_folder(data["router"]), encoder)
        if router.layout != gates.layout(denoiser(pipe)[0]):
            raise ValueError(f"{data['router']}: a router of a denoiser with other gates")
        count = len(router.codes.logits)
        if count != config.experts:
            raise ValueError(
                f"{data['router']}: a router of {count} experts, where experts is {config.experts}"
            )
    texts = read_paraphrases(data["paraphrases"]) if "paraphrases" in data else ()
    return Given(**vars(inputs), router=router, said_alike=texts)


def _folder(place: str) -> Path:
    """Of the two files of a router: itself or one of them, or an artifact or the model of one."""
    path = Path(place)
    folder = path.parent if path.is_file() else path
    for one in (folder, folder / ROUTER, folder / "model" / ROUTER):
        if (one / ABOUT).is_file():
            return one
    raise FormatError(path, f"no router: expected a folder with {ABOUT}, or an artifact of aptp")
