"""hashgrid_encode: rows as the paper and both conventions count them, and what does not fit."""

import itertools

import numpy as np
import pytest
import torch
from gencompress_kernels.hashgrid_encode import Levels, hashgrid_encode, hashgrid_levels

OP = "hashgrid_encode"
SMALL = hashgrid_levels(5, 2, 4, 40, log2_rows=9)
NETWORKS = 32 * 64 + 64 * 16 + 31 * 64 + 64 * 64 + 64 * 3


@pytest.mark.parametrize(
    ("log2_rows", "hashed", "ngp", "printed"),
    [
        (14, 492_928, 502_272, (0.50, 0.76, 1.39, 2.60)),
        (15, 934_928, 944_272, (0.94, 1.21, 1.83, 3.04)),
        (16, 1_765_568, 1_774_912, (1.77, 2.04, 2.66, 3.87)),
        (17, 3_326_288, 3_335_632, (3.34, 3.60, 4.22, 5.43)),
        (18, 6_209_872, 6_219_216, (6.22, 6.48, 7.10, 8.32)),
        (19, 11_477_728, 11_487_072, (11.49, 11.75, 12.37, 13.58)),
    ],
)
def test_parameters_of_the_paper(log2_rows, hashed, ngp, printed):
    levels = hashgrid_levels(log2_rows=log2_rows)
    assert 2 * levels.offsets[-1] == hashed
    assert 2 * levels.offsets[-1] + NETWORKS == ngp
    totals = [ngp, *(ngp + side**3 for side in (64, 96, 128))]
    assert [round(total / 1e6, 2) for total in totals] == list(printed)


def test_levels_of_both_conventions():
    levels, other = hashgrid_levels(), hashgrid_levels(convention="tcnn")
    sizes = (16, 22, 28, 37, 49, 64, 85, 112, 148, 195, 256, 338, 446, 589, 777, 1024)
    assert levels.resolutions == other.resolutions == sizes
    assert 2 * other.offsets[-1] == 11_420_064
    # 80^3 < 2^19 < 85^3
    assert levels.strides == tuple(size + 1 if size < 80 else 0 for size in sizes)
    assert other.strides == tuple(size if size < 80 else 0 for size in sizes)
    assert levels.scales == pytest.approx([16 * 2 ** (0.4 * k) - 1 for k in range(16)], rel=1e-14)
    assert all(rows % 8 == 0 for rows in levels.offsets)
    assert hashgrid_levels(1, 4, 7, 7, 6).offsets == (0, 64)


def test_corners_past_the_last_row_wrap(backend, device):
    """In tiny-cuda-nn's rows the point (1, 1, 1) reaches vertex N of N."""
    levels = hashgrid_levels(1, 1, 9, 9, 12, "tcnn")
    assert levels.strides == (9,) and levels.offsets == (0, 736)
    table = torch.arange(736.0)[:, None]
    far = hashgrid_encode(
        torch.ones(1, 3, device=device), table.to(device), levels, backend=backend
    )[0]
    rows = [x + 9 * y + 81 * z for x, y, z in itertools.product((8, 9), repeat=3)]
    assert max(rows) >= 736
    assert float(far) == pytest.approx(np.mean([row % 736 for row in rows]), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(5)}, r"points of shape \(5,\), expected \[M, 3\]"),
        ({"points": torch.zeros(5, 3).half()}, "points are torch.float16, expected float32"),
        ({"points": torch.zeros(5, 3).double()}, "table is torch.float32, expected torch.float64"),
        ({"table": torch.zeros(7, 2)}, r"table of shape \(7, 2\), expected \(.*, 2\)"),
        ({"logits": torch.zeros(4, 4)}, r"logits of shape \(4, 4\), expected a cube of side 2"),
        ({"logits": torch.zeros(4, 4, 3)}, "logits of shape .* expected a cube"),
        ({"logits": torch.zeros(1, 1, 1)}, "logits of shape .* expected a cube of side 2"),
        ({"logits": torch.zeros(3, 3, 3).double()}, "logits is torch.float64"),
        ({"cells": torch.zeros(3, 3, 3)}, "cells are torch.float32, expected torch.bool"),
        ({"cells": torch.zeros(0, 0, 0).bool()}, "cells of shape .* expected a cube of side 1"),
        ({"logits": torch.zeros(3, 3, 3), "cells": torch.ones(3, 3, 3).bool()},
         "3 cells along an axis for 3 logits, expected one less"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(change, message):
    good = {"points": torch.zeros(5, 3), "table": torch.zeros(SMALL.offsets[-1], 2)}
    with pytest.raises(ValueError, match=message):
        hashgrid_encode(**(good | change), levels=SMALL)


def test_float64_is_for_the_reference():
    points, table = torch.zeros(5, 3), torch.zeros(SMALL.offsets[-1], 2)
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        hashgrid_encode(points.double(), table.double(), SMALL, backend="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "ngp"}, "unknown convention 'ngp'; known: torch-ngp, tcnn"),
        ({"count": 0}, "0 levels of 2 features"),
        ({"features": 0}, "16 levels of 0 features"),
        ({"coarsest": 64, "finest": 32}, "64 to 32 cells"),
        ({"log2_rows": 40}, "log2_rows 40, expected 0 to 28"),
    ],
)
def test_levels_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        hashgrid_levels(**options)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (((), (), (0,), ()), "levels of 0 scales"),
        (((4.0,), (5,), (0, 8), (0, 0)), "1 offsets|2 strides"),
        (((4.0,), (5,), (8, 16), (0,)), "start at 0"),
        (((-1.0,), (5,), (0, 8), (0,)), "scale -1.0 of level 0"),
        (((4.0,), (5,), (0, 24), (0,)), "24 rows of hashed level 0, expected a power of two"),
        (((4.0,), (5,), (0, 0), (0,)), "0 rows of 2 features in level 0"),
        (((4.0,), (5,), (0, 216), (4,)), "stride 4 of dense level 0 does not fit"),
        (((4.0,), (5,), (0, 208), (6,)), "stride 6 of dense level 0 does not fit"),
    ],
)
def test_levels_that_do_not_fit_together(parts, message):
    with pytest.raises(ValueError, match=message):
        Levels(*parts, 2, "torch-ngp")
