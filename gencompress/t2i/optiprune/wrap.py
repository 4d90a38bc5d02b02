"""OptiPrune switched on for a pipeline of diffusers, and off again when the block ends.

Within the block the pipeline is called as ever. Before it samples, LatentMapper moves the noise
that it would start from, and while it samples SimPrune leaves tokens out. Between two calls nothing
of its models is changed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.optiprune.excite import Updates
from gencompress.t2i.optiprune.noise import NoiseConfig, noise_shape
from gencompress.t2i.optiprune.prune import BYPASSES, PruneConfig
from gencompress.t2i.optiprune.session import NEEDED, Session, Wanted, default_side, draw
from gencompress.t2i.optiprune.sites import find_sites
from gencompress.t2i.optiprune.subjects import Pieces
from gencompress.t2i.pipeline import denoiser


@contextlib.contextmanager
def optiprune(
    pipe: Any,
    ratio: float = 0.5,
    subjects: Wanted = "auto",
    *,
    min_tokens: int | None = None,
    noise: NoiseConfig | None = NoiseConfig(),  # noqa: B008
    updates: Updates | None = None,
    bypass: str = "auto",
    pieces: Pieces = "last",
    progress: Progress = quiet,
    **pruning: Any,
) -> Iterator[Any]:
    """Within the block `pipe` draws with optimised noise and fewer tokens:

        with optiprune(pipe, ratio=0.5) as pipe:
            image = pipe("a cat and a dog", generator=torch.Generator().manual_seed(0)).images[0]
            for row in pipe.optiprune.rows: print(row)

    It yields `pipe` itself, whose class is another one meanwhile: all parts, hooks and settings
    stay, and `pipe.optiprune` is the `Session`. So are pipelines that are made of it meanwhile. The
    noise of a picture starts from `latents`, or from what the generator gives the plain pipeline.

    Args:
        ratio: of the tokens that are left out; 0: none.
        subjects: of all prompts: see `subjects.find_subjects`.
        min_tokens: layers with fewer are left alone; None: all but the largest are.
        noise: how it is optimised, whatever its `sampling_steps` say; None: the noise stays.
        updates: of the latents between steps (Attend-and-Excite, InitNO); None: none.
        bypass: "auto": layers where pruning is forecast to take longer than it saves are left
            alone, and a warning says so; "never".
        pruning: other fields of `PruneConfig`.

    Raises:
        ValueError: settings that cannot be, a pipeline that is not called with a prompt and noise,
            or has no self-attention; when it is called: a prompt without a subject, arguments that
            noise cannot be scored with, or as `noise.map_noise`, `prune.pruned`, `excite.excite`.
    """
    if ratio == 0 and (pruning or min_tokens is not None):
        given = ", ".join([*pruning, *(["min_tokens"] if min_tokens is not None else [])])
        raise ValueError(f"ratio 0 with {given}: expected no settings of pruning without pruning")
    if bypass not in BYPASSES:
        raise ValueError(f"bypass {bypass!r}: expected {' or '.join(BYPASSES)}")
    unknown = sorted({*pruning} - {*PruneConfig.__dataclass_fields__} | {*pruning} & {"steps"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no settings of pruning that can be chosen here")
    prune = PruneConfig(ratio, min_tokens or 1, **pruning) if ratio else None
    session = Session(prune, min_tokens, subjects, pieces, noise, updates, bypass, progress)
    _check(pipe, session)
    plain = type(pipe)
    pipe.__class__ = _class(plain, session)
    try:
        yield pipe
    finally:
        session.on = False
        pipe.__class__ = plain


def _check(pipe: Any, session: Session) -> None:
    """Raises ValueError where it could only fail later."""
    kind = type(pipe).__name__
    running = getattr(type(pipe), "optiprune", None)
    if running is not None and running.on:
        raise ValueError(f"OptiPrune is on for this {kind} already; leave that first")
    takes = inspect.signature(type(pipe).__call__).parameters
    lacking = [name for name in NEEDED if name not in takes]
    if lacking or not hasattr(pipe, "components"):
        raise ValueError(
            f"a {kind} is not called with {', '.join(lacking)}; expected a text-to-image pipeline "
            "of diffusers"
        )
    model, _ = denoiser(pipe)
    if session.prune is not None and not find_sites(model):
        raise ValueError(f"a {type(model).__name__} without self-attention: ratio 0 prunes nothing")
    if session.updates is not None and "callback_on_step_end" not in takes:
        raise ValueError(f"a {kind} takes no updates between its steps")
    if session.noise_config is None and session.updates is None:
        return
    channels, latents = noise_shape(pipe, default_side(pipe))[0], pipe.vae.config.latent_channels
    if channels != latents or "image" in takes:
        raise ValueError(
            f"a {kind} is told more than text and noise, which cannot be scored; without noise and "
            "updates tokens are pruned alone"
        )


def _class(plain: type, session: Session) -> type:
    """A subclass under the same name, so that whatever is saved or made of it is the same."""
    call = plain.__call__

    @functools.wraps(call)
    def drawing(self: Any, *args: Any, **named: Any) -> Any:
        if not session.on:
            return call(self, *args, **named)
        bound = inspect.signature(call).bind(self, *args, **named)
        bound.apply_defaults()
        return draw(session, call, self, bound)

    about = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain)(
        plain.__name__, (plain,), about | {"__call__": drawing, "optiprune": session}
    )
