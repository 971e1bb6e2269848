"""The CUDA kernels on blocks of a larger problem, as linear_cross_entropy hands them over, on the emulator."""

import emulated
import pytest
import torch
from emulated import BFLOAT, FLOAT, HALF, Call, Guards, Matrix, checked, pointer
from test_cuda_emulated import check_cross_entropy, check_spherical, cross_entropy, inputs

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")


@pytest.fixture(scope="session")
def library():
    return emulated.build()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_blocks_equal_the_whole(library, dtype, soft):
    """Forward by rows and backward by classes write what one call writes."""
    torch.manual_seed(0)
    n, v = 7, 1030
    values, weight = (3 * torch.randn(n, v)).to(dtype), torch.rand(v)
    target = torch.softmax(torch.randn(n, v), 1) if soft else torch.tensor([0, 511, 512, -100, 1029, 700, 3])

    def run(row_blocks, class_blocks):
        guards = Guards()
        logits, targets, weights = guards.put(values), guards.put(target), guards.put(weight)
        rows = {"loss_rows": guards.empty(n), "share_rows": guards.empty(n), "row_state": guards.empty(3, n)}
        loss, total, upstream = guards.empty(), guards.empty(), guards.put(torch.tensor(0.7))
        gradient = guards.empty(n, v, dtype=dtype)

        def call(begin, end, first, last):
            part = Call(rows=end - begin, columns=last - first, ignore_index=-100, scale=1.0, label_smoothing=0.1)
            part.logits = Matrix.of(logits[begin:end, first:last])
            part.gradient = Matrix.of(gradient[begin:end, first:last])
            part.probabilities = Matrix.of(targets[begin:end, first:last] if soft else None)
            part.target = None if soft else pointer(targets[begin:])
            part.weight, part.loss, part.total = pointer(weights[first:]), pointer(loss), pointer(total)
            part.reduction = emulated.REDUCTIONS["sum"]
            part.grad_loss = pointer(upstream)
            part.all_rows, part.first_class, part.all_classes = n, first, v
            for name, tensor in rows.items():
                setattr(part, name, pointer(tensor[..., begin:]))
            return part

        for begin, end in row_blocks:
            checked(library.cross_entropy_forward(call(begin, end, 0, v)))
        for first, last in class_blocks:
            checked(library.cross_entropy_backward(call(0, n, first, last)))
        guards.check()
        return *rows.values(), gradient

    whole = run([(0, n)], [(0, v)])
    parts = run([(0, 3), (3, n)], [(0, 512), (512, 513), (513, v)])
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    x = values.double().requires_grad_()
    options = {"weight": weight.double(), "label_smoothing": 0.1, "reduction": "sum"}
    torch.nn.functional.cross_entropy(x, target.double() if soft else target, **options).backward()
    error = (parts[-1].double() - 0.7 * x.grad).norm() / (0.7 * x.grad).norm()
    assert error < (1e-6 if dtype == FLOAT else 4e-3)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("count", [0, 1, 1024, 2500])
def test_sums_of_16_bit_products(library, count, dtype):
    """The sum is float32's, and is rounded once."""
    torch.manual_seed(0)
    guards = Guards()
    parts = torch.randn(3, count).to(dtype)
    total, out = guards.empty(count), guards.empty(count, dtype=dtype)
    for i, part in enumerate(parts):
        held = guards.put(part)
        arguments = (emulated.DTYPES[dtype], pointer(held), pointer(total), pointer(out), count, i == 0, i == 2)
        checked(library.accumulate(*arguments))
    guards.check()
    expected = (parts[0].float() + parts[1].float()) + parts[2].float()
    assert torch.equal(total, expected) and torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("parts", [2, 5, 32])
@pytest.mark.parametrize("v", [1030, 50257])
def test_rows_of_several_blocks(library, v, parts):
    """Statistics of a row read in parts, some of which may be empty, are those of the whole."""
    logits, target = inputs(3, v, BFLOAT)
    for o in ({}, {"details": True, "label_smoothing": 0.1, "weight": torch.rand(v)}, {"softcap": 4.0}):
        for layout in ({}, {"offset": 3, "strides": (v + 5, 1)}, {"strides": (1, 3)}):
            actual = check_cross_entropy(library, logits, target, **o, layout=layout, parts=parts)
            again = cross_entropy(library, logits, target, **o, layout=layout, parts=parts)
            assert torch.equal(actual["loss_rows"], again["loss_rows"])
    check_cross_entropy(library, logits, torch.softmax(torch.randn(3, v), 1), parts=parts)
    for kind in ("z", "taylor", "spherical"):
        check_spherical(library, logits, target, kind, parts=parts)
    tied = torch.zeros(2, v)
    tied[1, [v - 1, v // 2]] = 1.0
    assert cross_entropy(library, tied, target[:2], details=True, parts=parts)["argmax"].tolist() == [0, v // 2]
    masked = torch.full((2, v), -torch.inf)
    masked[1, 7] = 0.5
    rows = cross_entropy(library, masked, torch.tensor([0, 7]), reduction="none", parts=parts)["loss_rows"]
    assert rows[0].isnan() and rows[1] == 0
