"""How much each unit of a denoiser matters: one function for all criteria, larger means keep.

Batches are noisy latents with their text (`calibrate.batches`); the loss is the denoising loss. A
model comes out as it went in: weights, gradients, hooks, and the mode of every module.

B samples, U units, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gencompress.core import score as core
from gencompress.core.allocate import proportional
from gencompress.core.mask import Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.score import Moments
from gencompress.core.units import Scores, Units
from gencompress.t2i import coupling
from gencompress.t2i.calibrate import Batch, counted
from gencompress.t2i.distill import predict, seeds

FROM_WEIGHTS = ("magnitude", "magnitude-l2", "random")
FROM_GRADIENTS = ("taylor", "nvit")
FROM_ACTIVATIONS = ("flap", "wanda", "obs", "ecoflap")
CRITERIA = (*FROM_WEIGHTS, *FROM_GRADIENTS, *FROM_ACTIVATIONS)

DAMPING = 1e-4  # of the mean squared gradient, on the diagonal of a Fisher matrix: taste
FLAT = 1e-200  # the same where no gate has a gradient
EPSILON = 1e-3  # the step of ECoFLaP


def scores(
    model: nn.Module,
    units: Sequence[Units],
    criterion: str,
    batches: Sequence[Batch] = (),
    generator: torch.Generator | None = None,
    *,
    gate: float = 0.0,
    progress: Progress = quiet,
) -> Scores:
    """float32 [U] per group, on the CPU.

    - magnitude, magnitude-l2: mean size of the weights a unit owns (`core.score.magnitude`).
    - random: uniform in [0, 1).
    - taylor, nvit: the first-order change of the loss, all that a unit owns taken together; the
      gradients are means over the batches (`core.score.taylor`, `core.score.nvit`).
    - flap: what is lost at the inputs of the layers that read a unit (`coupling.consumers`) once
      their means are made up for (`coupling.bias_shifts`): Var(x_j) ||W_j||^2, summed over its
      columns (An et al. 2023). In a convolution every pixel is a token and ||W_j|| is over all
      taps.
    - wanda: |W_ij| ||x_j||, summed over outputs, taps and columns (Sun et al. 2023).
    - obs: the second-order rise of the loss when a unit is switched off and the others of its
      group make up for it; see `obs`.
    - ecoflap: wanda, times the sensitivity of the group (`sensitivities`), by which groups become
      comparable (Sung et al. 2023).

    flap, wanda, obs and ecoflap look at the inputs of layers, which a block has not: blocks score
    by `removal` there, in another currency than heads and channels.

    Args:
        generator: on the CPU, for random and ecoflap.
        gate: taylor and nvit leave out samples with a loss up to this share of the largest one
            (Fang et al. 2023, "Diff-Pruning": 0.05, where the first timestep below it ends the
            pass).

    Raises:
        ValueError: an unknown criterion, or one that lacks batches or a generator.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    if criterion not in FROM_WEIGHTS and not batches:
        raise ValueError(f"{criterion} runs the model: expected batches, got none")
    if criterion in ("random", "ecoflap") and generator is None:
        raise ValueError(f"{criterion} draws numbers: expected a generator, got none")
    if criterion == "random":
        return {g.name: torch.rand(g.cost.numel(), generator=generator) for g in units}
    tensors = {name: one.detach() for name, one in model.named_parameters()}
    if criterion in FROM_WEIGHTS:
        p = 2 if criterion == "magnitude-l2" else 1
        found = {group.name: core.magnitude(tensors, group, p) for group in units}
    elif criterion in FROM_GRADIENTS:
        grads = gradients(model, units, batches, gate, progress)
        rule = core.taylor if criterion == "taylor" else core.nvit
        found = {group.name: rule(tensors, grads, group) for group in units}
    else:
        inner = [group for group in units if group.kind != "block"]
        blocks = [group for group in units if group.kind == "block"]
        found = removal(model, blocks, batches, progress)
        if inner and criterion == "obs":
            found |= obs(gate_gradients(model, inner, batches, progress))
        elif inner:
            moments = input_moments(model, inner, batches, progress)
            found |= _per_unit(model, inner, moments, flap=criterion == "flap")
        if criterion == "ecoflap":
            weights = sensitivities(model, inner, batches, generator, progress=progress)
            found |= {name: found[name] * weight for name, weight in weights.items()}
    return {group.name: found[group.name].float().cpu() for group in units}


def gradients(
    model: nn.Module,
    units: Sequence[Units],
    batches: Sequence[Batch],
    gate: float = 0.0,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    """float32: the mean gradient over the batches of every parameter that a unit owns of; `gate` as
    in `scores`."""
    names = dict.fromkeys(slice_.parameter for group in units for slice_ in group.owns)
    tensors = {name: one for name, one in model.named_parameters() if name in names}
    found = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in tensors.items()}
    least = 0.0
    if gate:
        with _still(model), torch.no_grad():
            least = gate * max(float(_losses(model, batch).max()) for batch in batches)
    with _still(model, tensors), torch.enable_grad():
        for batch in counted(batches, "scoring", progress):
            losses = _losses(model, batch)
            loss = (losses * (losses > least)).mean() / len(batches)
            parts = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
            for name, part in zip(tensors, parts, strict=True):
                if part is not None:
                    found[name] += part
    return found


def input_moments(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], progress: Progress = quiet
) -> dict[str, Moments]:
    """By module path, of each input of the layers that read the units: every token, or pixel, of
    every sample counts once.

    Raises ValueError where such a layer did not run.
    """
    found: dict[str, Moments] = {}

    def watch(path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        rows = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
        found[path] = core.add_tokens(found.get(path), rows)

    with _watched(model, units, watch), _still(model), torch.no_grad():
        for noised, conditions in counted(batches, "scoring", progress):
            predict(model, noised, conditions)
    silent = [path for path in _readers(units) if path not in found]
    if silent:
        raise ValueError(f"layers that read units did not run: {', '.join(silent)}")
    return found


def input_means(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """float64 [I] by module path, for `coupling.bias_shifts`."""
    return {path: one.mean for path, one in input_moments(model, units, batches).items()}


def gate_gradients(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], progress: Progress = quiet
) -> dict[str, Tensor]:
    """float32 [samples, U] per group, on the CPU: dL/dgate of each sample, where a gate of 1
    multiplies what the readers of a unit get; over samples, the mean of W dL/dW over the unit's
    columns."""
    sizes = [group.cost.numel() for group in units]
    owner = _owners(model, units)
    rows = []

    def switch(
        gates: Tensor, path: str, layer: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        x, *others = inputs
        factor = gates[:, owner[path].to(gates.device)].to(x.dtype)
        apart = (1,) * (x.ndim - 2)
        shape = (*factor.shape, *apart) if isinstance(layer, nn.Conv2d) else None
        return (x * factor.view(shape or (factor.shape[0], *apart, factor.shape[1])), *others)

    for noised, conditions in counted(batches, "scoring", progress):
        count, device = len(noised.latents), noised.latents.device
        gates = torch.ones(count, 1 + sum(sizes), device=device, requires_grad=True)
        hooked = _watched(model, units, partial(switch, gates))
        with hooked, _still(model, ()), torch.enable_grad():
            loss = _losses(model, (noised, conditions)).sum()
            rows.append(torch.autograd.grad(loss, gates)[0][:, 1:].cpu())
    parts = torch.cat(rows).split(sizes, 1)
    return {group.name: part for group, part in zip(units, parts, strict=True)}


def obs(gradients: Mapping[str, Tensor], damping: float = DAMPING) -> Scores:
    """[U] per group: 1 / (2 [F^-1]_uu), the rise of a quadratic loss when gate u goes from 1 to 0
    and the other gates of the group move to where it is least.

    F = (1/m) sum g g^T + lambda I over m samples, the empirical Fisher matrix of the gates
    (Kurtic et al. 2022, oBERT, there of weights), in float64. lambda is `damping` times the mean of
    g^2: an absolute one would be nothing for one group and everything for another, and with fewer
    samples than units F has no inverse without it. Kwon et al. 2022 (arXiv 2204.09656) rank heads
    and neurons by the same matrix.

    Args:
        gradients: as `gate_gradients`; float64 [U, U] is needed for a group.
    """
    return {
        name: (0.5 / _inverse(of, damping).diagonal()).float() for name, of in gradients.items()
    }


def obs_update(
    gradients: Mapping[str, Tensor], mask: Mask, damping: float = DAMPING
) -> dict[str, Tensor]:
    """float64 [U] for each group of the mask: by what to multiply the columns that read each unit
    (`coupling.consumers`), 0 for removed ones, so that the kept ones make up for them.

    With Q the removed gates, those of the group move by -F^-1[:, Q] ([F^-1]_QQ)^-1 1; F as in
    `obs`. Kwon et al. 2022 tune their masks after the same idea, by least squares on the outputs
    of each layer.
    """
    found = {}
    for name, keep in mask.keep.items():
        gone = ~keep.cpu()
        inverse = _inverse(gradients[name], damping)
        pull = torch.linalg.solve(inverse[gone][:, gone], torch.ones_like(inverse[0, gone]))
        found[name] = (1 - inverse[:, gone] @ pull).masked_fill(gone, 0.0)
    return found


def sensitivities(
    model: nn.Module,
    units: Sequence[Units],
    batches: Sequence[Batch],
    generator: torch.Generator,
    epsilon: float = EPSILON,
    progress: Progress = quiet,
) -> dict[str, float]:
    """Of each group: mean over the batches of |L(w + eps z) - L(w - eps z)| / (2 eps), with w all
    that its units own and z standard normal, the same on both sides; two forwards and no gradient
    (ECoFLaP, Sung et al. 2023)."""
    tensors = dict(model.named_parameters())
    found = {}
    chances = seeds(generator, len(units))
    with _still(model), torch.no_grad():
        pairs = list(zip(units, chances, strict=True))
        for group, seed in counted(pairs, "looking at layers", progress):
            sides = []
            for step in (epsilon, -epsilon):
                with _moved(tensors, group, step, seed):
                    sides.append(
                        [float(_losses(model, batch).double().mean()) for batch in batches]
                    )
            apart = [abs(one - other) for one, other in zip(*sides, strict=True)]
            found[group.name] = sum(apart) / len(apart) / (2 * epsilon)
    return found


def ecoflap_keep(
    model: nn.Module,
    units: Sequence[Units],
    sensitivity: Mapping[str, float],
    keep: int,
    max_sparsity: float,
) -> dict[str, int]:
    """How many units each group keeps, `keep` in all (`core.allocate.proportional`), in proportion
    to its sensitivity times the sum over its units of their mean |w|.

    A head counts as much as a channel: call it for each kind by itself.
    """
    tensors = {name: one.detach() for name, one in model.named_parameters()}
    importance = {
        group.name: sensitivity[group.name] * float(core.magnitude(tensors, group).double().sum())
        for group in units
    }
    sizes = {group.name: group.cost.numel() for group in units}
    return proportional(importance, sizes, keep, max_sparsity)


def removal(
    model: nn.Module, blocks: Sequence[Units], batches: Sequence[Batch], progress: Progress = quiet
) -> Scores:
    """[1] for each block: the mean squared change of the prediction when it is skipped."""
    total = {block.name: torch.zeros(1, dtype=torch.float64) for block in blocks}
    if not blocks:
        return {}
    with _still(model), torch.no_grad():
        for noised, conditions in counted(batches, "leaving out blocks", progress):
            whole = predict(model, noised, conditions)
            for block in blocks:
                skip = Mask({block.name: torch.zeros(1, dtype=torch.bool)})
                with coupling.apply(model, [block], skip):
                    apart = predict(model, noised, conditions) - whole
                total[block.name] += apart.double().square().mean().cpu() / len(batches)
    return {name: one.float() for name, one in total.items()}


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B]: the denoising loss of each sample."""
    noised, conditions = batch
    prediction = predict(model, noised, conditions)
    return (prediction - noised.target).square().flatten(1).mean(1)


def _per_unit(
    model: nn.Module, units: Sequence[Units], moments: Mapping[str, Moments], *, flap: bool
) -> Scores:
    """Column scores of FLAP, or else of Wanda, summed over the columns of each unit."""
    columns = {}
    for path, seen in moments.items():
        weight = model.get_submodule(path).weight.detach()
        matrix = weight.movedim(1, -1).flatten(0, -2)  # outputs and taps as rows
        if flap:
            columns[path] = core.flap(matrix, seen)
        else:
            norms = (seen.m2 + seen.count * seen.mean.square()).sqrt()
            columns[path] = core.wanda(matrix, norms).double().sum(0)
    found = {}
    for name, readers in coupling.consumers(units).items():
        count = next(group.cost.numel() for group in units if group.name == name)
        parts = [
            columns[path].double().narrow(0, start, count * width).view(count, width).sum(1)
            for path, start, width in readers
        ]
        found[name] = torch.stack(parts).sum(0).float()
    return found


def _inverse(gradients: Tensor, damping: float) -> Tensor:
    """float64 [U, U]: F^-1, see `obs`."""
    rows = gradients.double()
    ridge = max(damping * float(rows.square().mean()), FLAT)
    fisher = rows.T @ rows / len(rows)
    fisher.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(fisher))


def _readers(units: Sequence[Units]) -> list[str]:
    """Paths of the layers that read units, each once."""
    groups = coupling.consumers(units).values()
    return list(dict.fromkeys(columns.module for group in groups for columns in group))


def _owners(model: nn.Module, units: Sequence[Units]) -> dict[str, Tensor]:
    """By path of a reader, int64 [I]: which unit an input belongs to, counted from 1 over all
    groups; 0 for none."""
    found: dict[str, Tensor] = {}
    readers, before = coupling.consumers(units), 1
    for group in units:
        count = group.cost.numel()
        for path, start, width in readers[group.name]:
            inputs = model.get_submodule(path).weight.shape[1]
            owner = found.setdefault(path, torch.zeros(inputs, dtype=torch.int64))
            numbers = torch.arange(before, before + count).repeat_interleave(width)
            owner[start : start + count * width] = numbers
        before += count
    return found


@contextmanager
def _watched(model: nn.Module, units: Sequence[Units], hook: object) -> Iterator[None]:
    """Within the block, `hook(path, layer, inputs)` runs before every layer that reads units."""
    with ExitStack() as undo:
        for path in _readers(units):
            layer = model.get_submodule(path)
            undo.callback(layer.register_forward_pre_hook(partial(hook, path)).remove)
        yield


@contextmanager
def _still(model: nn.Module, wanted: Collection[str] = ()) -> Iterator[None]:
    """Within the block, the model is in evaluation mode and only the parameters named `wanted` take
    gradients."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(one, one.requires_grad) for one in model.parameters()]
    try:
        model.eval()
        for name, one in model.named_parameters():
            one.requires_grad_(name in wanted)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for one, flag in flags:
            one.requires_grad_(flag)


@contextmanager
def _moved(
    tensors: Mapping[str, nn.Parameter], group: Units, step: float, seed: int
) -> Iterator[None]:
    """Within the block, what the units of a group own is moved by `step` times standard normal
    numbers of the seed. The weights themselves lie untouched beside: one group is held twice."""
    names = dict.fromkeys(slice_.parameter for slice_ in group.owns)
    before = {name: tensors[name].data for name in names}
    chance = torch.Generator().manual_seed(seed)
    try:
        for name, data in before.items():
            tensors[name].data = data.clone()
        for name, axis, start, width in group.owns:
            part = tensors[name].data.narrow(axis, start, group.cost.numel() * width)
            part.add_(torch.randn(part.shape, generator=chance).to(part), alpha=step)
        yield
    finally:
        for name, data in before.items():
            tensors[name].data = data
