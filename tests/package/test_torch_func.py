"""torch.func: the transforms of every public function are those of its composition in PyTorch, or an error that names
the operator; never a silent zero."""

import pytest
import torch
from eager_functions import CASES, LABELS, weighed
from public_functions import CALLS, names
from torch.func import grad, jacrev, jvp, vmap

import tilewise

WITHOUT_GRADIENT = {"batch_hard_mine", "multi_similarity_mine", "semihard_mine", "sinkhorn_knopp", "wta_crs_sample"}


def all_of(transform):
    return lambda function, tensors: transform(function, tuple(range(len(tensors))))(*tensors)


def grads_of_examples(function, tensors):
    batched = [torch.stack([t, t.flip(0)]) for t in tensors]
    return vmap(grad(function, tuple(range(len(tensors)))))(*batched)


def grads_one_by_one(function, tensors):
    examples = [all_of(grad)(function, [t if i == 0 else t.flip(0) for t in tensors]) for i in range(2)]
    return tuple(torch.stack(parts) for parts in zip(*examples, strict=True))


def tangent(function, tensors):
    torch.manual_seed(1)
    return jvp(function, tuple(tensors), tuple(torch.randn_like(t) for t in tensors))[1]


# What is asked of us, and of the composition.
TRANSFORMS = {
    "grad": (all_of(grad), all_of(grad)),
    "vmap(grad)": (grads_of_examples, grads_one_by_one),
    "jacrev": (all_of(jacrev), all_of(jacrev)),
    "jvp": (tangent, tangent),
}


def test_every_differentiable_function_has_a_case():
    assert {name.partition(" ")[0] for name in CASES} == set(names()) - WITHOUT_GRADIENT
    assert set(CALLS) == set(names())


@pytest.mark.filterwarnings("ignore:tilewise.sinkhorn_divergence:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_composition_or_says_what_is_missing(name, transform):
    case, (ours, theirs) = CASES[name], TRANSFORMS[transform]
    if transform in case.refused:
        with pytest.raises(RuntimeError, match=rf"tilewise\.{name.partition(' ')[0]}"):
            ours(case.ours, case.tensors())
        return
    eager = case.eager
    if (name, transform) == ("wta_crs_linear", "jvp"):  # forward mode samples nothing

        def eager(x, w, b):
            return weighed(torch.nn.functional.linear(x, w, b))

    torch.testing.assert_close(ours(case.ours, case.tensors()), theirs(eager, case.tensors()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy rows", "linear_cross_entropy", "simplex_topk"])
def test_second_derivatives(name):
    case = CASES[name]
    found, expected = (jacrev(jacrev(function))(*case.tensors()) for function in (case.ours, case.eager))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_nested_levels_and_a_leaf_outside():
    case = CASES["cross_entropy"]
    (x,) = case.tensors()
    x.requires_grad_()
    found, expected = (
        torch.autograd.grad(grad(function)(x).square().sum(), x)[0] for function in (case.ours, case.eager)
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=r"tilewise\.cross_entropy_backward: .*forward mode"):
        jvp(grad(case.ours), (x,), (x,))


def test_an_overwriting_backward_is_refused():
    x = torch.randn(8, 5)
    with pytest.raises(ValueError, match=r"tilewise\.cross_entropy: inplace_backward is not available"):
        grad(lambda x: tilewise.cross_entropy(x, LABELS, inplace_backward=True))(x)


def test_forward_mode_without_torch_func():
    case = CASES["linear_cross_entropy"]
    tensors = case.tensors()
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, t.cos()) for t in tensors]
        found, expected = (
            torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent for function in (case.ours, case.eager)
        )
    torch.testing.assert_close(found, expected)


def test_rows_in_what_all_rows_share_have_no_forward_mode():
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    target = torch.tensor([0, 1, 2, 3])
    with pytest.raises(RuntimeError, match=r"tilewise\.linear_cross_entropy: .* of losses of rows in linear_weight"):
        jvp(lambda w: tilewise.linear_cross_entropy(x, w, target, reduction="none"), (w,), (w,))


def test_every_operator_says_what_it_has():
    """No operator lets a tangent, or a gradient, pass in silence."""
    for op in dir(torch.ops.tilewise):
        if op not in ("wta_crs_linear", "wta_crs_matmul") and not op.startswith("_") and op != "name":
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tilewise::{op}", "Autograd"), op
