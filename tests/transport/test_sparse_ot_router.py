"""The router: against the reference's plan, its balance, its mixture of experts, in one process and in two."""

import doctest

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import DEVICE, INTERPRETED, NATIVE_CPU

import tilewise
from tilewise.reference.sparse_ot import OPS as REFERENCE

TOKENS, EXPERTS = 96, 6


def logits_of(*batch):
    torch.manual_seed(0)
    return torch.randn(*batch, TOKENS, EXPERTS, dtype=torch.float64 if NATIVE_CPU else torch.float32, device=DEVICE)


@pytest.mark.parametrize("capacity", [5, 20, 40])
def test_against_the_reference(capacity):
    logits = logits_of(2)
    steps = 3 if INTERPRETED else 20
    routing = tilewise.sparse_ot_router(logits, capacity, steps=steps)
    probabilities = torch.softmax(logits.cpu().double(), -1).mT
    a, b = torch.ones(2, TOKENS).double(), torch.full((2, EXPERTS), TOKENS / EXPERTS).double()
    options = {"k": capacity, "gamma": 1.0, "method": "adam", "max_iter": steps, "tol": 0.0, "lr": 1e-2}
    values, indices, *_ = REFERENCE["sparse_ot"](-probabilities, a, b, **options)
    used = values > 0
    assert torch.equal(routing.load.cpu(), used.sum(2)) and routing.load.shape == (2, EXPERTS)
    assert torch.equal(routing.indices.cpu(), indices)
    expected = torch.where(used, probabilities.gather(2, indices), 0)
    torch.testing.assert_close(routing.weights.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations in the interpreter")
def test_steps_balance_the_tokens():
    """Every expert fills its places, and steps leave fewer tokens without one."""
    logits = logits_of() + 2 * torch.arange(EXPERTS, device=DEVICE) / EXPERTS
    left = []
    for steps in (1, 5, 20):
        routing = tilewise.sparse_ot_router(logits, TOKENS // EXPERTS, steps=steps)
        assert (routing.load == TOKENS // EXPERTS).all()
        left.append(TOKENS - len(routing.indices.unique()))
    assert left[0] > left[1] > left[2]


def test_gradient_is_that_of_the_softmax():
    logits = logits_of().requires_grad_()
    routing = tilewise.sparse_ot_router(logits, 20, steps=2)
    (found,) = torch.autograd.grad(routing.weights.square().sum(), logits)
    chosen = torch.softmax(logits, -1).mT.gather(1, routing.indices) * (routing.weights > 0)
    (expected,) = torch.autograd.grad(chosen.square().sum(), logits)
    torch.testing.assert_close(found, expected)


def test_mixture_of_experts():
    """Against a loop over tokens."""
    torch.manual_seed(0)
    experts = [torch.nn.Linear(5, 3) for _ in range(EXPERTS)]
    router = tilewise.nn.SparseOTRouter(5, EXPERTS, capacity_factor=1.5, steps=2)
    mixture = tilewise.nn.MixtureOfExperts(router, experts).to(DEVICE)
    x = torch.randn(2, 48, 5, device=DEVICE)
    out, tokens = mixture(x), x.reshape(-1, 5)
    routing = router(tokens)
    assert routing.indices.shape == (EXPERTS, 24)
    expected = torch.zeros(96, 3, device=DEVICE)
    for expert, taken, weights in zip(experts, routing.indices, routing.weights, strict=True):
        for token, weight in zip(taken, weights, strict=True):
            expected[token] += weight * expert(tokens[token])
    torch.testing.assert_close(out.reshape(-1, 3), expected, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert router.gate.weight.grad.abs().sum() > 0 and all(e.weight.grad is not None for e in experts)


def test_a_router_of_another_size_is_refused():
    experts = [torch.nn.Linear(5, 3) for _ in range(4)]
    mixture = tilewise.nn.MixtureOfExperts(tilewise.nn.SparseOTRouter(5, 3, steps=1), experts).to(DEVICE)
    with pytest.raises(ValueError, match=r"tilewise.nn.MixtureOfExperts: expected the router to have 4 experts, got 3"):
        mixture(torch.randn(12, 5, device=DEVICE))


@pytest.mark.parametrize(
    ("capacity", "options", "message"),
    [
        (0, {}, "capacity to be an integer of at least 1, got 0"),
        (97, {}, "capacity to be at most 96, the tokens, got 97"),
        (4, {"steps": 0}, "steps to be an integer of at least 1"),
        (4, {"lr": 0.0}, "lr to be a finite number above 0"),
        (4, {"gamma": -1.0}, "gamma to be a finite number above 0"),
    ],
    ids=str,
)
def test_bad_arguments(capacity, options, message):
    with pytest.raises(ValueError, match=f"tilewise.sparse_ot_router: expected {message}"):
        tilewise.sparse_ot_router(logits_of(), capacity, **options)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="the examples are for a CPU")
@pytest.mark.parametrize("module", [tilewise.nn.SparseOTRouter, tilewise.nn.MixtureOfExperts], ids=lambda m: m.__name__)
def test_examples(module):
    test = doctest.DocTestFinder(recurse=False).find(module, "module", globs={})[0]
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
