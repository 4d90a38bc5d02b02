"""token_merge: which tokens leave and what they copy, by brute force on exact numbers and more."""

import functools

import numba
import numpy as np
import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.token_merge import (
    Match,
    _match,
    _rows,
    _sums,
    compact_tokens,
    match_tokens,
    recover_tokens,
)
from numerics import assert_as_accurate

GRIDS = [(33, 45), (64, 96), (135, 240), (2, 3), (7, 4)]


def draw(batch, num, channels, seed=0):
    return torch.randn(batch, num, channels, generator=torch.Generator().manual_seed(seed))


def exact_tokens(batch, num, channels=8, seed=0):
    """Four ones a token, times a power of two: unit vectors of halves, cosines of quarters. All
    sums are exact in any order, and most values occur many times."""
    g = torch.Generator().manual_seed(seed)
    ones = torch.rand(batch, num, channels, generator=g).argsort(2)[..., :4]
    tokens = torch.zeros(batch, num, channels).scatter(2, ones, 1.0)
    return tokens * 2.0 ** torch.randint(-3, 4, (batch, num, 1), generator=g)


def exact_noise(batch, num, seed=1):
    return torch.randint(-8, 9, (batch, num), generator=torch.Generator().manual_seed(seed)) / 8


def unit_of(x):
    x = x.double().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_bases(scores, height, width, patch=(2, 2)):
    """Ascending; one loop over patches, one over the tokens of each."""
    found = []
    for top in range(0, height - patch[0] + 1, patch[0]):
        for left in range(0, width - patch[1] + 1, patch[1]):
            own = [(top + i) * width + left + j for i in range(patch[0]) for j in range(patch[1])]
            found.append(max(own, key=lambda token: (scores[token], -token)))
    return np.sort(found)


def brute_nearest(unit, tokens, candidates):
    values, places = [], []
    for block in np.array_split(tokens, max(len(tokens) // 512, 1)):
        cosines = unit[block] @ unit[candidates].T
        places.append(candidates[cosines.argmax(1)])
        values.append(cosines.max(1))
    return np.concatenate(values), np.concatenate(places)


def brute_match(x, noise, height, width, ratio, recover_from="base", patch=(2, 2)):
    """One sample [N, C] as SiTo writes it: sums of similarities, noise times 1."""
    unit = unit_of(x)
    scores = unit @ unit.sum(0) + noise.double().numpy()
    base = brute_bases(scores, height, width, patch)
    others = np.setdiff1d(np.arange(len(unit)), base)
    values, nearest = brute_nearest(unit, others, base)
    order = np.lexsort((others, -values))[: int(ratio * len(unit))]
    leaves = others[order]
    kept = np.setdiff1d(np.arange(len(unit)), leaves)
    feeder = np.arange(len(unit))
    feeder[leaves] = nearest[order]
    if recover_from == "kept":
        feeder[leaves] = brute_nearest(unit, leaves, kept)[1]
    return kept, feeder


@functools.cache
def exact_case(height, width, ratio, recover_from, batch=2):
    num = height * width
    x, noise = exact_tokens(batch, num), exact_noise(batch, num)
    pairs = zip(x, noise, strict=True)
    return x, noise, [brute_match(*pair, height, width, ratio, recover_from) for pair in pairs]


def check_partition(match, num, removed):
    """Sizes, order, and that sources and counts agree with each other."""
    batch = len(match.kept)
    assert match.kept.shape == match.counts.shape == (batch, num - removed)
    assert match.source.shape == (batch, num)
    assert match.kept.dtype == match.source.dtype == torch.int64
    assert match.counts.dtype == torch.float32
    places = torch.arange(num - removed, device=match.kept.device)
    for kept, source, counts in zip(match.kept, match.source, match.counts, strict=True):
        assert (kept.diff() > 0).all() and kept[0] >= 0 and kept[-1] < num
        assert torch.equal(source[kept], places)
        assert torch.equal(counts.long(), torch.bincount(source, minlength=num - removed))
    assert (match.counts.sum(1) == num).all()


def same(a, b):
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(one.cpu(), two.cpu()) for one, two in pairs)


@pytest.mark.parametrize("recover_from", ["base", "kept"])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.74])
@pytest.mark.parametrize("grid", [(33, 45), (7, 4), (2, 3)])
def test_equals_brute_force_with_ties(backend, device, grid, ratio, recover_from):
    ratio = min(ratio, 1 - (grid[0] // 2) * (grid[1] // 2) / (grid[0] * grid[1]))
    x, noise, truth = exact_case(*grid, ratio, recover_from)
    match = match_tokens(
        x.to(device), *grid, ratio, noise=noise.to(device), alpha=1.0, relative=False,
        recover_from=recover_from, backend=backend,
    )  # fmt: skip
    num = grid[0] * grid[1]
    check_partition(match, num, int(ratio * num))
    for sample, (kept, feeder) in enumerate(truth):
        assert match.kept[sample].tolist() == kept.tolist()
        got = match.kept[sample][match.source[sample]]
        assert got.tolist() == feeder.tolist()


@pytest.mark.parametrize("grid", [(64, 96), (135, 240)])
def test_equals_brute_force_on_large_grids(backend, device, grid):
    """More candidates than a tile has, and a last tile that is not full."""
    x, noise, ((kept, feeder),) = exact_case(*grid, 0.5, "base", 1)
    match = match_tokens(
        x.to(device), *grid, 0.5, noise=noise.to(device), alpha=1.0, relative=False,
        backend=backend,
    )  # fmt: skip
    check_partition(match, grid[0] * grid[1], grid[0] * grid[1] // 2)
    assert torch.equal(match.kept[0].cpu(), torch.from_numpy(kept))
    assert torch.equal(match.kept[0][match.source[0]].cpu(), torch.from_numpy(feeder))


@pytest.mark.parametrize("patch", [(1, 1), (1, 2), (3, 2), (4, 5)])
def test_other_patches(backend, device, patch):
    height, width, ratio = 13, 21, 0.4 if patch != (1, 1) else 0.0
    x, noise = exact_tokens(1, height * width), exact_noise(1, height * width)
    match = match_tokens(
        x.to(device), height, width, ratio, patch=patch, noise=noise.to(device), alpha=1.0,
        relative=False, backend=backend,
    )  # fmt: skip
    kept, feeder = brute_match(x[0], noise[0], height, width, ratio, patch=patch)
    assert match.kept[0].tolist() == kept.tolist()
    assert match.kept[0][match.source[0]].tolist() == feeder.tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_at_the_maximum_only_bases_stay(backend, device, grid):
    """One a full patch, the rows and columns left over have none; beyond is an error."""
    height, width = grid
    num, bases = height * width, (height // 2) * (width // 2)
    x = draw(2 if num < 9999 else 1, num, 4).to(device)
    match = match_tokens(x, height, width, (num - bases + 0.5) / num, backend=backend)
    check_partition(match, num, num - bases)
    row, column = match.kept // width // 2, match.kept % width // 2
    assert (row < height // 2).all() and (column < width // 2).all()
    patches = (row * (width // 2) + column).sort(1).values
    assert torch.equal(patches, torch.arange(bases, device=device).expand(len(x), -1))
    if bases == 1:
        return
    with pytest.raises(ValueError, match=f"leaves out {num - bases + 1} of {num} tokens, expected"):
        match_tokens(x, height, width, (num - bases + 1.5) / num, backend=backend)


def test_similarity_without_a_matrix():
    """To all tokens added up, from one vector: the row sums of the Gram matrix."""
    from gencompress_kernels.token_merge import cpu, reference

    x = draw(2, 1536, 24) + 0.3
    unit = torch.from_numpy(unit_of(x))
    exact = reference.similarity(unit)
    assert torch.allclose(exact, (unit @ unit.mT).sum(2), rtol=1e-12)
    plain = reference.similarity(unit.float())
    got, filled = torch.empty_like(plain), torch.empty_like(x)
    cpu._score(x.numpy(), filled.numpy(), got.numpy())
    assert torch.allclose(plain.double(), exact, rtol=1e-4)
    assert torch.allclose(got.double(), exact, rtol=1e-4)
    assert_as_accurate(got, plain, exact, floor=1e-4)
    assert torch.allclose(filled.double(), unit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recover_from", ["base", "kept"])
def test_random_tokens_find_the_most_similar(backend, device, recover_from):
    """Float rounding may decide between values within 1e-5, nothing else."""
    grid, num = (34, 41), 34 * 41
    x, noise = draw(2, num, 40), draw(2, num, 1, seed=3)[..., 0]
    match = match_tokens(
        x.to(device), *grid, 0.5, noise=noise.to(device), recover_from=recover_from,
        backend=backend,
    )  # fmt: skip
    for sample in range(2):
        unit, kept = unit_of(x[sample]), match.kept[sample].cpu().numpy()
        base = expected_bases(unit, noise[sample], grid, 0.1)
        assert set(base) <= set(kept)
        gone = np.setdiff1d(np.arange(num), kept)
        rest = np.setdiff1d(kept, base)
        values = brute_nearest(unit, gone, base)[0]
        assert values.min() >= brute_nearest(unit, rest, base)[0].max() - 1e-5
        feeder = kept[match.source[sample].cpu().numpy()][gone]
        best, _ = brute_nearest(unit, gone, base if recover_from == "base" else kept)
        chosen = (unit[gone] * unit[feeder]).sum(1)
        assert np.abs(chosen - best).max() < 1e-5
        assert recover_from == "kept" or set(feeder) <= set(base)


def expected_bases(unit, noise, grid, alpha):
    """With noise in units of the root mean square deviation within the patches."""
    height, width = grid
    scores = (unit @ unit.sum(0) / len(unit)).reshape(grid)
    cut = scores[: height // 2 * 2, : width // 2 * 2]
    cut = cut.reshape(height // 2, 2, width // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    scale = alpha * np.sqrt(cut.var(1).mean())
    return brute_bases(scores.ravel() + scale * noise.double().numpy(), height, width)


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_relative_noise(backend, device, alpha):
    """In units of the deviation within patches: tokens that differ less get less of it."""
    grid, num = (24, 30), 720
    x, noise = draw(1, num, 16) + 1, draw(1, num, 1, seed=5)[..., 0]
    flat = x.mean(1, keepdim=True) + 0.1 * (x - x.mean(1, keepdim=True))
    for tokens in (x, flat):
        match = match_tokens(
            tokens.to(device), *grid, 0.75, noise=noise.to(device), alpha=alpha,
            backend=backend,
        )  # fmt: skip
        expected = expected_bases(unit_of(tokens[0]), noise[0], grid, alpha)
        assert np.isin(match.kept[0].cpu().numpy(), expected).mean() > 0.99


def test_raw_noise_is_absolute(backend, device):
    """SiTo's numbers: a noise of 1e-3 decides nothing where sums differ by a quarter, a large one
    everything."""
    grid, num = (12, 16), 192
    x, noise = exact_tokens(1, num).to(device), draw(1, num, 1, seed=6)[..., 0].to(device)
    options = dict(relative=False, backend=backend)
    quiet = match_tokens(x, *grid, 0.75, **options).kept
    loud = match_tokens(x, *grid, 0.75, noise=noise, alpha=1e6, **options).kept
    expected = brute_bases(noise[0].cpu().numpy(), *grid)
    assert torch.equal(loud[0].cpu(), torch.from_numpy(expected))
    assert not torch.equal(quiet, loud)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("recover_from", ["base", "kept"])
def test_identical_tokens_recover_exactly(backend, device, ratio, recover_from):
    """Ties everywhere: the lower of the others go, and copy the first base."""
    x = draw(1, 1, 20).expand(2, 20 * 30, 20).to(device)
    match = match_tokens(x, 20, 30, ratio, recover_from=recover_from, backend=backend)
    check_partition(match, 600, int(ratio * 600))
    back = recover_tokens(compact_tokens(x, match, backend=backend), match, backend=backend)
    assert torch.equal(back, x)
    token = torch.arange(600, device=device)
    corner = (token // 30 % 2 == 0) & (token % 2 == 0)
    leaves = token[~corner][: int(ratio * 600)]
    assert torch.equal(match.kept[1], token[~torch.isin(token, leaves)])
    assert (match.source[:, leaves] == 0).all()


@pytest.mark.parametrize("recover_from", ["base", "kept"])
def test_samples_do_not_depend_on_each_other(backend, device, recover_from):
    x, noise = draw(4, 33 * 20, 10).to(device), draw(4, 660, 1, seed=8)[..., 0].to(device)
    options = dict(recover_from=recover_from, backend=backend)
    together = match_tokens(x, 33, 20, 0.6, noise=noise, **options)
    for i in range(4):
        alone = match_tokens(x[i : i + 1], 33, 20, 0.6, noise=noise[i : i + 1], **options)
        mine = Match(*(tensor[i : i + 1] for tensor in vars(together).values()))
        assert same(alone, mine)
    assert not torch.equal(together.kept[0], together.kept[1])


def test_same_result_at_any_thread_count():
    x, noise = draw(2, 1500, 30), draw(2, 1500, 1)[..., 0]
    before, found = numba.get_num_threads(), []
    for threads in (1, 2):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            found.append(match_tokens(x, 30, 50, 0.6, noise=noise, backend="cpu"))
        finally:
            numba.set_num_threads(before)
    assert same(*found)


def test_the_same_every_time_and_no_random_numbers(backend, device):
    x, noise = draw(1, 600, 8).to(device), draw(1, 600, 1)[..., 0].to(device)
    before = torch.get_rng_state()
    found = [match_tokens(x, 20, 30, 0.5, noise=noise, backend=backend) for _ in range(2)]
    assert same(*found) and torch.equal(before, torch.get_rng_state())


def test_noise_spreads_what_is_left_out(backend, device):
    """A still picture over 50 steps: without noise the same tokens leave each time; a tenth of the
    deviation within patches varies a quarter of them, as much as the deviation most."""
    g, size, steps = torch.Generator().manual_seed(0), 32, 50
    coarse = torch.randn(1, 16, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    x = (smooth + 0.02 * torch.randn(1, 16, size, size, generator=g)).flatten(2).mT.to(device)
    varied = []
    for alpha in (0.0, 0.1, 1.0):
        stays = torch.zeros(size * size, device=device)
        for _ in range(steps):
            noise = torch.randn(1, size * size, generator=g).to(device)
            match = match_tokens(x, size, size, 0.5, noise=noise, alpha=alpha, backend=backend)
            stays[match.kept[0]] += 1
        varied.append(float(((stays > 0) & (stays < steps)).float().mean()))
    assert varied[0] == 0 and 0.15 < varied[1] < 0.5 and varied[2] > 0.75


@pytest.mark.parametrize("ratio", [0.0, 1e-6])
def test_nothing_left_out(backend, device, ratio):
    x = draw(2, 35, 3).to(device)
    match = match_tokens(x, 5, 7, ratio, noise=x[..., 0], backend=backend)
    check_partition(match, 35, 0)
    assert torch.equal(compact_tokens(x, match, backend=backend), x)
    assert torch.equal(recover_tokens(x, match, backend=backend), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(backend, device, dtype):
    """Half precisions choose as float32 does, and rows keep their dtype."""
    x = (draw(1, 24 * 32, 20) + 1).to(device, dtype)
    noise = draw(1, 24 * 32, 1, seed=2)[..., 0].to(device)
    got = match_tokens(x, 24, 32, 0.5, noise=noise, backend=backend)
    wanted = match_tokens(x.float(), 24, 32, 0.5, noise=noise, backend=backend)
    if dtype != torch.float64 or backend != "reference":
        assert same(got, wanted)
    compact = compact_tokens(x, got, backend=backend)
    assert compact.dtype == recover_tokens(compact, got, backend=backend).dtype == dtype


def test_tokens_without_direction(backend, device):
    """Zeros resemble nothing and stay; numbers that are none leave the indices valid."""
    x = draw(1, 64, 4).abs().to(device)
    zeros = torch.tensor([9, 22, 63], device=device)
    x[0, zeros] = 0
    match = match_tokens(x, 8, 8, 0.5, backend=backend)
    check_partition(match, 64, 32)
    assert torch.isin(zeros, match.kept[0]).all()
    x[0, :5], x[0, 7] = torch.nan, torch.inf
    for recover_from in ("base", "kept"):
        check_partition(
            match_tokens(x, 8, 8, 0.5, recover_from=recover_from, backend=backend), 64, 32
        )
    check_partition(match_tokens(x[..., :0], 8, 8, 0.5, backend=backend), 64, 32)


def test_strided_inputs_are_only_read(backend, device):
    x, noise = draw(2, 99, 7).to(device), draw(2, 99, 1, seed=4)[..., 0].to(device)
    wide, odd = x.mT.contiguous().mT, noise.T.contiguous().T
    before = wide.clone(), odd.clone()
    assert not wide.is_contiguous() and not odd.is_contiguous()
    got = match_tokens(wide, 9, 11, 0.6, noise=odd, backend=backend)
    assert same(got, match_tokens(x, 9, 11, 0.6, noise=noise, backend=backend))
    loose = Match(*(tensor.T.contiguous().T for tensor in vars(got).values()))
    few = compact_tokens(wide, loose, backend=backend)
    assert torch.equal(few, compact_tokens(x, got, backend=backend))
    turned = few.mT.contiguous().mT
    recovered = recover_tokens(turned, loose, backend=backend)
    assert torch.equal(recovered, recover_tokens(few, got, backend=backend))
    assert torch.equal(wide, before[0]) and torch.equal(odd, before[1])


def test_no_samples(backend, device):
    match = match_tokens(torch.zeros(0, 12, 4, device=device), 3, 4, 0.5, backend=backend)
    assert match.kept.shape == (0, 6) and match.source.shape == (0, 12)
    few = compact_tokens(torch.zeros(0, 12, 4, device=device), match, backend=backend)
    assert recover_tokens(few, match, backend=backend).shape == (0, 12, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(12, 4)), "expected floating"),
        (dict(x=torch.zeros(1, 12, 4).long()), "x is torch.int64"),
        (dict(height=4), "12 tokens for a grid of 4 x 4"),
        (dict(height=-3, width=-4), "12 tokens for a grid of -3 x -4"),
        (dict(ratio=1.0), "ratio 1.0, expected 0 <= ratio < 1"),
        (dict(ratio=-0.1), "ratio -0.1"),
        (dict(ratio=0.92), "leaves out 11 of 12 tokens, expected at most 10"),
        (dict(patch=(4, 4)), "expected at most 0: one stays in each of 0 patches of 4 x 4"),
        (dict(patch=(0, 2)), "patch of 0 x 2"),
        (dict(noise=torch.zeros(12)), r"noise is torch.float32 \(12,\)"),
        (dict(noise=torch.zeros(1, 12).long()), "noise is torch.int64"),
        (dict(recover_from="all"), "recover_from 'all', expected one of base, kept"),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    arguments = dict(x=torch.zeros(1, 12, 4), height=3, width=4, ratio=0.5) | changes
    with pytest.raises(ValueError, match=message):
        match_tokens(**arguments)


def test_registered_ops(backend, device):
    x = draw(2, 12, 4).to(device)
    for noise in (None, x[..., 0].contiguous()):
        for removed in (0, 6):
            options = (3, 4, 2, 2, removed, 0.1, True, True, backend)
            torch.library.opcheck(_match, (x, noise, *options))
    match = match_tokens(x, 3, 4, 0.5, backend=backend)
    torch.library.opcheck(_rows, (x.clone().requires_grad_(), match.kept, backend))
    torch.library.opcheck(_sums, (x.clone().requires_grad_(), match.source, 6, backend))
    torch.library.opcheck(_sums, (x.half(), match.source, 6, backend))
    assert dispatch.last()["token_merge"] == backend
