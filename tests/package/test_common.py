"""csrc/common, as every instruction set compiles it, against NumPy in float64."""

import numpy as np
import pytest
import torch

native = pytest.importorskip("native_tests", reason="`make native` builds this module in the source tree")

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)


@pytest.fixture(params=[isa for isa in ("v2", "v3", "v4", "baseline") if hasattr(native, isa)])
def maths(request):
    return getattr(native, request.param)


def ulp_error(actual, expected):
    """Distance in units in the last place of the float32 result; a subnormal's unit is the smallest float."""
    return np.abs(actual.astype(np.float64) - expected) / np.spacing(np.abs(expected).astype(np.float32))


def test_exp_over_its_whole_range(maths):
    x = np.concatenate([np.linspace(-87, 88, 2_000_001), np.linspace(-1e-3, 1e-3, 100_001)]).astype(np.float32)
    error = ulp_error(maths.map_float("exp", x), np.exp(x.astype(np.float64)))
    assert error.max() <= 1.25, f"{error.max():.2f} ulp at x = {x[error.argmax()]}"


def test_exp_at_the_edges(maths):
    """Results that would be subnormal are 0: never negative, never something else."""
    x = np.concatenate([np.linspace(-110, -87.01, 10_001), [-1e30, -np.inf]]).astype(np.float32)
    assert (maths.map_float("exp", x) == 0).all()
    assert maths.map_float("exp", np.float32([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_nan_stays_nan(maths):
    for function in ("exp", "tanh", "sigmoid", "softplus"):
        assert np.isnan(maths.map_float(function, np.float32([np.nan, 1.0]))).tolist() == [True, False]


@pytest.mark.parametrize(
    ("function", "exact", "most_ulp"),
    [
        ("tanh", np.tanh, 2.0),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 3.0),
        ("softplus", lambda x: np.logaddexp(0, x), 3.0),
    ],
)
def test_relative_error_of(maths, function, exact, most_ulp):
    near_zero = np.geomspace(1e-30, 1, 50_000)
    x = np.concatenate([np.linspace(-80, 80, 200_001), near_zero, -near_zero]).astype(np.float32)
    error = ulp_error(maths.map_float(function, x), exact(x.astype(np.float64)))
    assert error.max() <= most_ulp, f"{error.max():.2f} ulp at x = {x[error.argmax()]}"


def test_every_half_widens_exactly(maths):
    np.testing.assert_array_equal(maths.half_to_float(ALL_16_BITS), ALL_16_BITS.view(np.float16).astype(np.float32))


def test_every_bfloat16_widens_exactly(maths):
    expected = (ALL_16_BITS.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(maths.bfloat16_to_float(ALL_16_BITS), expected)


def floats_to_round():
    """Random bit patterns, every half's and bfloat16's neighbours and ties, infinities and NaN."""
    random = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    exact = np.concatenate(
        [ALL_16_BITS.view(np.float16).astype(np.float32), (ALL_16_BITS.astype(np.uint32) << 16).view(np.float32)]
    )
    bits = exact.view(np.uint32)
    around = [exact] + [(bits + np.uint32(delta)).view(np.float32) for delta in (1, 0xFFF, 0x1000, 0x1001, 0x7FFF)]
    around += [(bits + np.uint32(delta)).view(np.float32) for delta in (0x8000, 0x8001, 0xFFFFFFFF)]
    return np.concatenate([random, *around])


def rounded_by_torch(x, dtype):
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("narrow", "dtype"), [("float_to_half", torch.float16), ("float_to_bfloat16", torch.bfloat16)])
def test_narrowing_rounds_to_nearest_even(maths, narrow, dtype):
    x = floats_to_round()
    actual, is_nan = getattr(maths, narrow)(x), np.isnan(x)
    np.testing.assert_array_equal(actual[~is_nan], rounded_by_torch(x[~is_nan], dtype))
    as_float = torch.from_numpy(actual.view(np.int16)).view(dtype).float().numpy()
    assert np.isnan(as_float[is_nan]).all()


@pytest.mark.parametrize(
    ("x", "half"),
    [
        (1 + 2.0**-11, 0x3C00),  # a tie goes to the even 1
        (1 + 3 * 2.0**-11, 0x3C02),  # a tie goes to the even 1 + 2^-9
        (2.0**-25, 0x0000),  # half of the smallest subnormal is a tie with 0
        (1.5 * 2.0**-24, 0x0002),
        (65519.0, 0x7BFF),
        (65520.0, 0x7C00),
        (-np.inf, 0xFC00),
    ],
)
def test_half_ties_and_overflow(maths, x, half):
    assert maths.float_to_half(np.float32([x]))[0] == half


def random_tiles(rng, n):
    cuts = np.unique(rng.integers(1, n, size=7))
    tiles = np.concatenate([[0], cuts, [n]])
    return tiles, rng.permutation(len(tiles) - 1)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("seed", range(5))
def test_softmax_statistics_merge_in_any_order(maths, seed, offset):
    rng = np.random.default_rng(seed)
    n = 1000
    x = (rng.normal(size=n) * 10 + offset).astype(np.float32)
    x[rng.integers(0, n, 50)] = -np.inf
    x[rng.permutation(n)[:2]] = x.max()  # argmax has a tie
    c = np.where(np.isinf(x), 0, rng.random(n)).astype(np.float32)
    tiles, order = random_tiles(rng, n)
    highest, others, mass, cross, spread, argmax = maths.softmax(x, c, tiles, order)

    d = x.astype(np.float64) - x.max()
    finite = np.isfinite(d)
    assert highest == x.max()
    assert argmax == np.argmax(x)
    np.testing.assert_allclose(others, np.exp(d[np.arange(n) != argmax]).sum(), rtol=1e-5)
    np.testing.assert_allclose(mass, c.astype(np.float64).sum(), rtol=1e-5)
    np.testing.assert_allclose(cross, (c[finite].astype(np.float64) * d[finite]).sum(), rtol=2e-5)
    np.testing.assert_allclose(spread, (np.exp(d[finite]) * d[finite]).sum(), rtol=2e-5)


def test_softmax_statistics_of_tiles_of_minus_infinity(maths):
    x = np.full(12, -np.inf, dtype=np.float32)
    x[5] = 3.0
    c = np.zeros(12, dtype=np.float32)
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert maths.softmax(x, c, [0, 4, 8, 12], order) == (3.0, 0.0, 0.0, 0.0, 0.0, 5)


def test_a_small_sum_keeps_its_digits_beside_the_maximum(maths):
    x = np.full(1000, -18.0, dtype=np.float32)
    for place in (0, 500, 999):
        x[place] = 0.0
        others = maths.softmax(x, np.zeros_like(x), [0, 300, 501, 1000], [1, 2, 0])[1]
        np.testing.assert_allclose(others, 999 * np.exp(-18.0), rtol=1e-5)
        x[place] = -18.0


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("seed", range(5))
def test_moments_merge_in_any_order(maths, seed, mean):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=1000) * 3 + mean).astype(np.float32)
    count, average, m2, _ = maths.moments(x, *random_tiles(rng, len(x)))
    exact = x.astype(np.float64)
    assert count == len(x)
    np.testing.assert_allclose(average, exact.mean(), rtol=1e-6, atol=1e-6)
    # E[x^2] - E[x]^2 in float32 would be wrong by a factor here: squares of 1e4 carry an error of about 8.
    np.testing.assert_allclose(m2, ((exact - exact.mean()) ** 2).sum(), rtol=1e-3 if mean else 1e-5)


@pytest.mark.parametrize("magnitude", [1e16, 1e30, 1e38])
def test_moments_of_large_values_come_in_smaller_units(maths, magnitude):
    rng = np.random.default_rng(0)
    x = (rng.uniform(-1, 1, 1000) * np.where(np.arange(1000) < 500, 1, magnitude)).astype(np.float32)
    count, average, m2, scale = maths.moments(x, *random_tiles(rng, len(x)))
    scaled = x.astype(np.float64) * scale
    assert count == 1000 and scale == 2.0**-96
    np.testing.assert_allclose(average, scaled.mean(), rtol=1e-4)
    np.testing.assert_allclose(m2, np.square(scaled - scaled.mean()).sum(), rtol=1e-5)


def test_moments_of_equal_values_have_no_variance(maths):
    count, average, m2, _ = maths.moments(np.full(300, 0.1, dtype=np.float32), [0, 100, 150, 300], [2, 0, 1])
    assert (count, average, m2) == (300, np.float32(0.1), 0.0)


PRODUCTS = [  # rows, depth, columns
    (1, 1, 1),
    (6, 512, 64),
    (7, 513, 65),
    (97, 1025, 3),
    (13, 40, 200),
    (200, 5, 131),
    (11, 0, 9),
    (101, 600, 301),  # several blocks of rows, of columns and of the depth
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("a_layout", ["rows", "columns"])
@pytest.mark.parametrize("c_layout", ["rows", "columns"])
@pytest.mark.parametrize("start", ["none", "in place", "row", "column"])
def test_matrix_product(maths, dtype, shape, a_layout, c_layout, start):
    """Within the rounding of float64 of NumPy; nothing beyond C is written; shares of threads do not change a bit."""
    rows, depth, columns = shape
    rng = np.random.default_rng(0)

    def matrix(height, width, layout="rows", border=0):
        full = rng.standard_normal((height + border, width + border)).astype(dtype)
        full = full if layout == "rows" else np.asfortranarray(full)
        return full, full[:height, :width]

    _, a = matrix(rows, depth, a_layout)
    _, b = matrix(depth, columns)
    results = []
    begin, _ = matrix(rows + 3, columns + 3, c_layout)
    broadcast = {"row": begin[:1, :columns].copy(), "column": begin[:rows, :1].copy()}.get(start)
    for parts in (1, 2, 7):
        outer = begin.copy(order="K")
        out = outer[:rows, :columns]
        first = out if start == "in place" else None
        if broadcast is not None:
            first = np.broadcast_to(broadcast, (rows, columns))
        added = np.zeros_like(out) if first is None else first.copy()
        getattr(maths, f"multiply_{dtype}")(a, b, out, first, parts)
        results.append(outer)
        exact = added.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
        bound = (depth + 2) * np.finfo(dtype).eps * (np.abs(added) + np.abs(a) @ np.abs(b)) + 1e-300
        assert (np.abs(out - exact) <= bound).all()
        assert (outer[rows:] == begin[rows:]).all() and (outer[:, columns:] == begin[:, columns:]).all()
    assert all((result == results[0]).all() for result in results)
