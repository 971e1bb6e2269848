"""FactoredSphericalOutput equals plain SGD on the dense weight, at a cost that does not depend on the classes."""

import copy
import functools

import contract
import pytest
import torch
from contract import DEVICE

import tilewise
from tilewise.nn import FactoredSphericalOutput
from tilewise.nn import factored_spherical_output as module
from tilewise.reference import z_loss as reference
from tilewise.testing import allocated_bytes, relative_error

pytestmark = pytest.mark.skipif(contract.BACKEND not in ("cpu", "cuda"), reason="uses no kernel: once per device")
D, SIZE, BATCH = 50, 8, 12


def squared_error(logits, target):
    one_hot = torch.nn.functional.one_hot(target, logits.shape[1])
    return (logits - one_hot).square().sum(1).mean()


KINDS = {
    "z": (reference.z_loss, {"a": 1.5, "b": 0.4}, 0.5),
    "taylor": (reference.taylor_softmax_loss, {}, 0.1),
    "spherical": (reference.spherical_softmax_loss, {"eps": 1e-2}, 0.02),
    "mse": (squared_error, {}, 0.01),
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def batches(steps, seed=0):
    """Batches in which classes repeat; float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        target = torch.randint(0, D, (BATCH,), generator=generator)
        target[: BATCH // 3] = target[0]
        yield torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64), target


def initial_weight():
    """float64 of float32 numbers."""
    return torch.randn(D, SIZE, generator=torch.Generator().manual_seed(1)).double() / 2


@functools.cache
def dense_sgd(kind, steps, decay=0.0, factor=1.0):
    """The weight after plain SGD in float64."""
    dense, options, lr = KINDS[kind]
    weight = initial_weight().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=lr, weight_decay=decay)
    for hidden, target in batches(steps):
        optimizer.zero_grad()
        (factor * dense(hidden @ weight.t(), target, **options)).backward()
        optimizer.step()
    return weight.detach()


def train(layer, kind, steps, factor=1.0, seed=0):
    for hidden, target in batches(steps, seed):
        (factor * layer(hidden.to(layer.v), target.to(DEVICE))).backward()
        layer.step(KINDS[kind][2])


@by_kind
@pytest.mark.parametrize("stabilize_every", [1, 10, 50])
def test_500_steps_equal_dense_sgd(kind, stabilize_every):
    options = KINDS[kind][1] | {"kind": kind, "weight_decay": 0.02, "stabilize_every": stabilize_every}
    layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE), **options)
    train(layer, kind, 500, factor=0.7)
    weight = layer.dense_weight().cpu()
    expected = dense_sgd(kind, 500, decay=0.02, factor=0.7)
    assert relative_error(weight, expected) < 1e-9
    assert relative_error(expected, initial_weight()) > 0.1  # it has learnt something
    assert relative_error(layer.gram.cpu(), weight.t() @ weight) < 1e-9
    assert relative_error(layer.row_sum.cpu(), weight.sum(0)) < 1e-9
    assert relative_error((layer.u @ layer.u_inverse).cpu(), torch.eye(SIZE, dtype=torch.float64)) < 1e-9


@by_kind
def test_2000_steps_in_float32(kind):
    layer = FactoredSphericalOutput.from_dense(initial_weight().float().to(DEVICE), kind=kind, **KINDS[kind][1])
    train(layer, kind, 2000)
    expected = dense_sgd(kind, 2000)
    assert relative_error(layer.dense_weight().double().cpu(), expected) < 1e-4


@by_kind
def test_loss_and_hidden_gradient_equal_the_dense_ones(kind):
    dense, options, _ = KINDS[kind]
    layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE), kind=kind, **options)
    train(layer, kind, 23)
    (hidden, target), weight = next(batches(1, seed=5)), layer.dense_weight().cpu()
    ours, truth = hidden.clone().to(DEVICE).requires_grad_(), hidden.clone().requires_grad_()
    loss, expected = layer(ours, target.to(DEVICE)), dense(truth @ weight.t(), target, **options)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-10, atol=1e-12)
    assert relative_error(ours.grad.cpu(), truth.grad) < 1e-9


def test_every_branch_of_stabilization_keeps_the_weight():
    """One value out of range is pulled back into v, many unfactorise."""
    for drifted, unfactorised in ((1, False), (5, True)):
        layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE))
        layer.u[:drifted] *= 100
        layer.omega += 1
        weight = layer.dense_weight()
        layer._stabilize()
        values = torch.linalg.svdvals(layer.u)
        assert values.min() > 0.5 and values.max() < 2
        assert relative_error(layer.dense_weight().cpu(), weight.cpu()) < 1e-12
        assert relative_error((layer.u @ layer.u_inverse).cpu(), torch.eye(SIZE, dtype=torch.float64)) < 1e-12
        assert (layer.omega.count_nonzero() == 0) == unfactorised


def test_a_skipped_update_of_the_gram_matrix_shows(monkeypatch):
    """The comparison with dense SGD is no tautology: with a stale Gram matrix it fails."""
    update = FactoredSphericalOutput._update

    def stale(self, *batch):
        gram = self.gram.clone()
        update(self, *batch)
        self.gram = gram

    monkeypatch.setattr(FactoredSphericalOutput, "_update", stale)
    layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE), **KINDS["z"][1])
    train(layer, "z", 20)
    assert relative_error(layer.dense_weight().cpu(), dense_sgd("z", 20)) > 1e-4


def test_state_dict_continues():
    layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE), stabilize_every=7)
    train(layer, "z", 24)
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"v", "u", "omega", "_extra_state"}
    loaded = FactoredSphericalOutput(SIZE, D, stabilize_every=7, device=DEVICE, dtype=torch.float64)
    loaded.load_state_dict(state)
    assert loaded.updates == 24
    for either in (layer, loaded):
        train(either, "z", 20, seed=3)
    torch.testing.assert_close(loaded.dense_weight(), layer.dense_weight(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(loaded.u, layer.u, rtol=1e-9, atol=1e-10)
    assert loaded.updates == layer.updates == 44


def test_predict_equals_dense_topk(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE))
    train(layer, "z", 13)
    hidden, _ = next(batches(1, seed=4))
    for k in (1, 7, D):
        scores, classes = layer.predict(hidden.to(DEVICE), k)
        expected, indices = (hidden.to(DEVICE) @ layer.dense_weight().t()).topk(k)
        torch.testing.assert_close(scores, expected)
        assert torch.equal(classes, indices)


def test_nothing_is_as_large_as_the_classes():
    classes = 10**6
    layer = FactoredSphericalOutput(SIZE, classes, device=DEVICE, stabilize_every=1)
    hidden, target = next(batches(1))
    hidden, target = hidden.float().to(DEVICE).requires_grad_(), target.to(DEVICE)

    def train_step():
        layer(hidden, target).backward()
        layer.step(0.01)

    train_step()  # a GPU's libraries have their workspaces now
    assert allocated_bytes(train_step, DEVICE) < 4 * classes
    many = torch.randn(200, SIZE, device=DEVICE)
    assert allocated_bytes(lambda: layer.predict(many, 5), DEVICE) < 6 * 4 * (module.CHUNK + 200 * 10)


def test_hidden_that_needs_no_gradient_and_evaluation():
    """The first layer of a model learns too; an evaluation under no_grad is no forward to step after."""
    layer = FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE))
    hidden, target = next(batches(1))
    before, first = layer.dense_weight(), layer(hidden.to(DEVICE), target.to(DEVICE))
    first.backward()
    with torch.no_grad():
        assert not layer(hidden.to(DEVICE), target.to(DEVICE)).requires_grad
    layer.step(0.5)
    assert not torch.equal(before, layer.dense_weight())
    with torch.no_grad():
        assert layer(hidden.to(DEVICE), target.to(DEVICE)) < first
    assert list(layer.parameters()) == []
    assert layer(hidden[:0].to(DEVICE), target[:0].to(DEVICE)).item() == 0


def test_an_optimizer_may_change_hidden_before_step():
    layers = [FactoredSphericalOutput.from_dense(initial_weight().to(DEVICE)) for _ in range(2)]
    for layer, change in zip(layers, (0.0, 1.0), strict=True):
        hidden, target = next(batches(1))
        hidden = hidden.to(DEVICE).requires_grad_()
        layer(hidden, target.to(DEVICE)).backward()
        with torch.no_grad():
            hidden += change
        layer.step(0.5)
    assert torch.equal(layers[0].dense_weight(), layers[1].dense_weight())


def test_errors_of_the_protocol():
    layer = FactoredSphericalOutput(SIZE, D, device=DEVICE, dtype=torch.float64)
    hidden, target = (x.to(DEVICE) for x in next(batches(1)))
    name = r"^tilewise\.FactoredSphericalOutput: expected"
    with pytest.raises(RuntimeError, match=f"{name} step to follow a backward, but there was none since the last step"):
        layer.step(0.1)
    stale = layer(hidden, target)
    with pytest.raises(RuntimeError, match=f"{name} step to follow a backward, but the last forward had none"):
        layer.step(0.1)
    layer(hidden, target).backward()
    with pytest.raises(TypeError, match=f"{name} step to be given lr alone, got momentum: .*linear_z_loss"):
        layer.step(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=rf"{name} lr to be a finite number in \[0, inf\], got -1"):
        layer.step(-1)
    layer.step(0.1)
    with pytest.raises(RuntimeError, match=f"{name} backward before step, got a loss of an earlier weight"):
        stale.backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the loss is NaN")
@pytest.mark.parametrize("bad", [D, -1])
def test_target_out_of_range(bad):
    layer, target = FactoredSphericalOutput(SIZE, D), torch.tensor([0, bad])
    expected = rf"^tilewise\.FactoredSphericalOutput: expected target\[1\] in \[0, {D}\), got {bad}"
    with pytest.raises(RuntimeError, match=expected):
        layer(torch.randn(2, SIZE), target)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"kind": "softmax"}, ValueError, "kind to be z, taylor, spherical, mse, got 'softmax'"),
        ({"in_features": 0}, ValueError, "in_features to be a positive integer, got 0"),
        ({"num_classes": 2.5}, ValueError, "num_classes to be a positive integer, got 2.5"),
        ({"stabilize_every": 0}, ValueError, "stabilize_every to be a positive integer, got 0"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype to be float32 or float64, got torch.bfloat16"),
        ({"a": 0.0}, ValueError, "a to be a finite number above 0, got 0.0"),
        ({"eps": 0.0}, ValueError, "eps to be a finite number above 0, got 0.0"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay to be a finite number in \[0, inf\], got -0.1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=rf"^tilewise\.FactoredSphericalOutput: expected {message}"):
        FactoredSphericalOutput(**{"in_features": SIZE, "num_classes": D} | options)


def test_bad_arguments():
    layer = tilewise.nn.FactoredSphericalOutput(SIZE, D, device=DEVICE)
    name, hidden = r"^tilewise\.FactoredSphericalOutput: expected", torch.randn(2, SIZE, device=DEVICE)
    target = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=rf"{name} hidden to have {SIZE} columns, got shape \(2, 3\)"):
        layer(hidden[:, :3], target.long())
    with pytest.raises(TypeError, match=f"{name} target to hold integer class indices, got torch.float32"):
        layer(hidden, target)
    with pytest.raises(ValueError, match=rf"{name} target to have shape \(2,\), got \(1,\)"):
        layer(hidden, target[:1].long())
    with pytest.raises(ValueError, match=rf"{name} topk to be in \[1, {D}\], got {D + 1}"):
        layer.predict(hidden, D + 1)
    with pytest.raises(ValueError, match=rf"{name} weight to be 2-D, got shape \({SIZE},\)"):
        FactoredSphericalOutput.from_dense(hidden[0])
