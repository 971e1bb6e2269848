"""The CUDA kernels of wta_crs, run by the CPU emulator, against the reference."""

import emulated
import pytest
import torch
from emulated import DTYPES, Guards, RowsCall, checked, pointer

from tilewise.ops.wta_crs import METHODS
from tilewise.reference.wta_crs import MIX_BITS
from tilewise.reference.wta_crs import OPS as REFERENCE

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library():
    return emulated.build()


def rows_call(x, **fields):
    batch, rows, columns = x.shape
    call = RowsCall(batch=batch, rows=rows, columns=columns, dtype=DTYPES[x.dtype], data=x.data_ptr(), **fields)
    call.batch_stride, call.row_stride, call.column_stride = x.stride()
    return call


def norms_of(kind, rows):
    norms, other = (3 * torch.randn(2, rows)).exp(), torch.rand(2, rows)
    if kind == "few":
        norms = norms * (torch.rand(2, rows) < 0.05)
    elif kind == "zero":
        norms, other = torch.zeros(2, rows), None
    elif kind == "wrong":
        norms[1, rows // 2] = torch.nan
    return norms, other


def check_sample(library, kind, rows, k, method, mix):
    guards, (norms, other), seed = Guards(), norms_of(kind, rows), torch.randint(2**63 - 1, (1,))
    expected = REFERENCE["wta_crs_sample"](norms, other, seed, k=k, method=method, mix=mix)
    indices, scales = guards.empty(2, k, dtype=torch.int32), guards.empty(2, k)
    call = RowsCall(batch=2, rows=rows, k=k, indices=pointer(indices), scales=pointer(scales))
    held = [None if t is None else guards.put(t) for t in (norms, other, seed)]
    checked(library.wta_crs_sample(call, *map(pointer, held), METHODS.index(method), int(mix * 2**MIX_BITS)))
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scales, expected[1], rtol=0, atol=0, equal_nan=True)
    guards.check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 100, 700, 2500])
def test_sample(library, rows, method):
    torch.manual_seed(0)
    for k in sorted({1, (rows + 9) // 10, rows // 2 + 1, rows}):
        for mix, kind in ((0.05, "heavy"), (0.0, "few"), (0.5, "zero"), (0.05, "wrong")):
            check_sample(library, kind, rows, k, method, mix)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "kinds"), [(4097, ["heavy", "few", "zero", "wrong"]), (40000, ["heavy"])])
def test_rows_of_many_blocks(library, rows, kinds, method):
    """Parts of 32 and of 64 rows, the last one smaller; most have no certain row, or all are certain."""
    torch.manual_seed(0)
    for kind in kinds:
        for k in {rows // 10, rows} if kind == "heavy" else {rows // 3}:
            check_sample(library, kind, rows, k, method, 0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 33, 256, 1500])
@pytest.mark.parametrize("layout", ["dense", "shifted", "transposed"])
def test_norms_and_gather(library, layout, columns, dtype):
    torch.manual_seed(0)
    guards = Guards()
    strides = (9 * columns, 1, 9) if layout == "transposed" else None
    x = guards.empty(2, 9, columns, dtype=dtype, strides=strides, offset=int(layout == "shifted"))
    x.copy_(torch.randn(2, 9, columns))
    norms = guards.empty(2, 9)
    checked(library.wta_crs_norms(rows_call(x, out=pointer(norms))))
    torch.testing.assert_close(norms, REFERENCE["wta_crs_norms"](x), rtol=1e-7, atol=0)
    indices = torch.tensor([[8, 0, 3, 3], [1, 2, 8, 7]], dtype=torch.int32)
    scales = torch.rand(2, 4) * 5
    for given in (None, scales):
        out = guards.empty(2, 4, columns, dtype=dtype)
        held = guards.put(indices), None if given is None else guards.put(given)
        places = {"k": 4, "indices": pointer(held[0]), "scales": pointer(held[1]), "out": pointer(out)}
        checked(library.wta_crs_gather(rows_call(x, **places)))
        assert torch.equal(out, REFERENCE["wta_crs_gather"](x, indices, given))
    guards.check()


def test_indices_out_of_range_are_nan(library):
    guards = Guards()
    x, out = guards.put(torch.ones(1, 3, 40)), guards.empty(1, 3, 40)
    indices = guards.put(torch.tensor([[-1, 1, 3]], dtype=torch.int32))
    checked(library.wta_crs_gather(rows_call(x, k=3, indices=pointer(indices), out=pointer(out))))
    assert out[0, ::2].isnan().all() and (out[0, 1] == 1).all()
    guards.check()
