"""Layers with sampled weight gradients: drop-in, converted, grouped, cached, checkpointed, with LoRA."""

import copy

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import BACKEND, DEVICE, INTERPRETED, NATIVE_CPU
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise.nn import NormCache, SampledGroup, WTACRSLinear, convert_linear, restore_linear, set_sample_ids
from tilewise.testing import saved_bytes

QKV = [("q", "k", "v")]
SAMPLES, TOKENS, WIDTH = 12, 20, 32


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """Attention and a multilayer perceptron, before which it normalises."""

    def __init__(self, width=WIDTH, heads=4):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.before_attention(x)
        q, k, v = (layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


def stack(blocks=2, width=WIDTH):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks))).to(DEVICE)


def batch(size=4, tokens=TOKENS, width=WIDTH):
    return torch.randn(size, tokens, width, device=DEVICE)


def gradients(model, x, wrap=lambda f, x: f(x)):
    model.zero_grad()
    wrap(model, x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_is_a_linear_layer():
    """The parameters, names, initial values, results and gradients of nn.Linear; exact in evaluation."""
    torch.manual_seed(1)
    plain = nn.Linear(8, 5).to(DEVICE)
    torch.manual_seed(1)
    ours = WTACRSLinear(8, 5, ratio=0.2).to(DEVICE)
    assert isinstance(ours, nn.Linear) and ours.load_state_dict(plain.state_dict())
    x = torch.randn(4, 10, 8, device=DEVICE)
    assert torch.equal(ours(x), plain(x))
    sampled, exact = gradients(ours, x), gradients(plain, x)
    assert torch.equal(sampled["bias"], exact["bias"]) and not torch.equal(sampled["weight"], exact["weight"])
    assert torch.equal(gradients(ours.eval(), x)["weight"], exact["weight"])
    assert "ratio=0.2" in repr(ours)


def test_convert_and_restore():
    model, x = stack(), batch()
    parameters, exact = dict(model.named_parameters()), gradients(model, x)
    expected = model(x)
    assert convert_linear(model, ratio=0.3, include="*.[quv]*", exclude=["1.*", "*.v"]) is model
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind is WTACRSLinear} == {"0.q", "0.up"}
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), expected)
    sampled = gradients(model, x)
    differ = {name for name in exact if not torch.equal(sampled[name], exact[name])}
    assert differ == {"0.q.weight", "0.up.weight"}
    assert restore_linear(model) is model
    assert not any(isinstance(m, WTACRSLinear) for m in model.modules())
    torch.testing.assert_close(gradients(model, x), exact, rtol=0, atol=0)


def test_converting_keeps_what_is_not_a_plain_layer():
    """A layer of another class may mean another thing; a layer with two names stays one, a hook where it was."""

    class Scaled(nn.Linear):
        pass

    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": Scaled(4, 4), "b": shared, "c": nn.ModuleList([shared])})
    convert_linear(model, ratio=0.5)
    assert type(model["a"]) is Scaled and type(model["b"]) is WTACRSLinear
    assert model["b"] is model["c"][0] is shared
    seen = []
    layer = nn.Linear(4, 4).to(DEVICE)
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    x = torch.randn(9, 4, device=DEVICE)
    assert type(convert_linear(layer, ratio=0.5)) is WTACRSLinear and torch.equal(layer(x), restore_linear(layer)(x))
    assert seen == [WTACRSLinear, nn.Linear] and vars(layer).keys() == vars(nn.Linear(4, 4)).keys()


def kept_bytes(model, x) -> int:
    """Of linear layers, without their weights."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return saved_bytes(lambda: model(x), apart_from=model.parameters(), within=layers)


def test_memory_of_a_stack():
    """Four blocks at ratio 0.1 keep a tenth for their linear layers; without a group, q, k and v keep a sample each."""
    blocks, tokens = (1, 5) if INTERPRETED else (4, 50)
    model, x = stack(blocks, 64), batch(8, tokens, 64)
    n = 8 * tokens
    full = kept_bytes(model, x)
    assert full == blocks * 7 * n * 64 * 4  # h, attention, h, and four times as much behind the GELU
    ours = kept_bytes(convert_linear(model, ratio=0.1, groups=QKV), x)
    k = n // 10
    assert ours == blocks * (7 * k * 64 * 4 + 4 * 8 * k)
    assert full / ours > 9
    apart = kept_bytes(convert_linear(restore_linear(model), ratio=0.1), x)
    assert apart == blocks * (9 * k * 64 * 4 + 6 * 8 * k)


def test_a_group_shares_one_sample():
    """Each weight's gradient is that of the same rows; a new input is a new sample, and nothing is held back."""
    group = SampledGroup([nn.Linear(8, size) for size in (5, 3, 8)], ratio=0.2).to(DEVICE)
    x, grads = torch.randn(50, 8, device=DEVICE), [torch.randn(50, size, device=DEVICE) for size in (5, 3, 8)]
    torch.manual_seed(3)
    outs = group(x)
    torch.manual_seed(3)
    sample = tilewise.wta_crs_sample(x, ratio=0.2)
    torch.autograd.backward(outs, grads)
    rows = sample.indices.long()
    for layer, out, grad in zip(group.layers, outs, grads, strict=True):
        assert torch.equal(out, functional.linear(x, layer.weight, layer.bias))
        expected = (grad[rows] * sample.scales[:, None]).T @ x[rows]
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-4)
    shared = group.layers[0].shared
    assert shared.x is None and shared.sample is None
    first, second, third = group.layers
    other = torch.randn(50, 8, device=DEVICE)
    samples = [shared.draw(first, x), shared.draw(first, x), shared.draw(second, other)]
    assert len({tuple(s.indices.tolist()) for s in samples}) == 3  # one layer twice; another input
    assert shared.draw(first, other) is samples[2]
    other += 1  # written to in between
    assert shared.draw(third, other) is not samples[2]


def test_members_that_do_not_sample_are_not_waited_for():
    group = SampledGroup([nn.Linear(8, 8) for _ in range(3)], ratio=0.2).to(DEVICE)
    group.layers[1].weight.requires_grad_(False)
    group.layers[2].eval()
    x = torch.randn(50, 8, device=DEVICE)
    outs = group(x)
    assert group.layers[0].shared.x is None
    assert all(torch.equal(o, functional.linear(x, m.weight, m.bias)) for o, m in zip(outs, group.layers, strict=True))


@pytest.mark.parametrize("grouped", [False, True])
def test_cache_of_norms(grouped):
    """Unseen samples go by the mean of the seen of their batch; the next visit goes by what the backward wrote."""
    model = convert_linear(stack(1), ratio=0.2, groups=QKV if grouped else (), samples=SAMPLES, tokens=TOKENS + 5)
    x, ids = batch(), torch.tensor([3, 9, 0, 4], device=DEVICE)
    set_sample_ids(model, ids)
    layer = model[0].up
    assert layer.cache.norms.dtype == torch.bfloat16 and (layer.cache.norms < 0).all()
    assert (layer.cache.read(ids, TOKENS) == 1).all()
    kept = {}
    layer.register_full_backward_hook(lambda m, i, out: kept.update(grad=out[0]))
    gradients(model, x)
    written = layer.cache.norms[ids]
    torch.testing.assert_close(written[:, :TOKENS], kept["grad"].norm(dim=2).bfloat16())
    assert (written[:, TOKENS:] == -1).all() and (layer.cache.norms[[1, 2, 5]] == -1).all()
    read = layer.cache.read(torch.tensor([3, 1], device=DEVICE), TOKENS)
    assert torch.equal(read[0], layer.cache.norms[3, :TOKENS].float())
    torch.testing.assert_close(read[1], read[0].mean().expand(TOKENS))
    state = model.state_dict()
    assert state["0.up.cache.norms"].shape == (SAMPLES, TOKENS + 5)
    again = convert_linear(stack(1), ratio=0.2, samples=SAMPLES, tokens=TOKENS + 5)
    again.load_state_dict(state)
    assert torch.equal(again[0].up.cache.norms, layer.cache.norms)
    with pytest.raises(ValueError, match="expected to know the samples of a call"):
        again(x)
    with pytest.raises(ValueError, match="expected x of 4 samples"):
        model(batch(3))
    with pytest.raises(ValueError, match=r"int64 of shape \(b,\), got torch.float32"):
        set_sample_ids(model, torch.ones(3))
    restore_linear(model)
    assert not any("cache" in name for name in model.state_dict())


@pytest.mark.skipif(not NATIVE_CPU or BACKEND == "reference", reason="statistics of what test_same_rows compares")
def test_a_cache_lowers_the_variance():
    """Tokens whose gradient is small, as padding, are drawn rarely once their norms are known."""
    layer = WTACRSLinear(16, 8, ratio=0.1, cache=NormCache(4, 100))
    plain = WTACRSLinear(16, 8, ratio=0.1)
    x, grad = torch.randn(4, 100, 16), torch.randn(4, 100, 8) * (torch.rand(4, 100, 1) < 0.2)
    exact = grad.reshape(-1, 8).T @ x.reshape(-1, 16)
    layer.sample_ids = torch.arange(4)
    errors = {}
    for name, model in (("cached", layer), ("plain", plain)):
        draws = []
        for _ in range(60):
            draws += torch.autograd.grad(model(x), model.weight, grad)
        errors[name] = sum((d - exact).square().sum() for d in draws[1:]).item()
    assert errors["cached"] < 0.3 * errors["plain"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """A block that is run again in the backward draws the same rows, its group and its cache too."""
    model = convert_linear(stack(1), ratio=0.2, groups=QKV, samples=SAMPLES, tokens=TOKENS)
    set_sample_ids(model, torch.arange(4, device=DEVICE))
    x = batch().requires_grad_()
    gradients(model, x)  # fills the caches
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    plain = gradients(model, x)
    model.load_state_dict(state)
    torch.manual_seed(5)
    again = gradients(model, x, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_accumulation_and_clipping():
    """Gradients add up over micro-batches and are clipped as any other."""
    model, first, second = convert_linear(stack(1), ratio=0.3, groups=QKV), batch(), batch()
    torch.manual_seed(5)
    parts = [gradients(model, x) for x in (first, second)]
    torch.manual_seed(5)
    model.zero_grad()
    for x in (first, second):
        model(x).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, parts[0][name] + parts[1][name])
    before = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    after = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert before > 1e-3 and abs(float(after) - 1e-3) < 1e-5


def test_copies_are_apart():
    model = convert_linear(stack(1), ratio=0.3, groups=QKV)
    other = copy.deepcopy(model)
    assert other[0].q.shared is other[0].k.shared is not model[0].q.shared
    assert other[0].q in other[0].q.shared.layers and model[0].q not in other[0].q.shared.layers
    assert gradients(other, batch()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be compiled")
def test_compile():
    """In one graph, with groups and caches; results and exact gradients are those without."""
    model, x = stack(1), batch()
    exact = gradients(model, x)
    convert_linear(model, ratio=0.3, groups=QKV, samples=SAMPLES, tokens=TOKENS)
    ids = torch.tensor([1, 5, 7, 2], device=DEVICE)
    set_sample_ids(model, ids)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    found = gradients(compiled, x)
    for name, gradient in exact.items():
        ours = found[f"_orig_mod.{name}"]
        if "weight" not in name or "before" in name:
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-7)
        else:
            assert 0 < (ours - gradient).norm() < 2 * gradient.norm()
    assert (model[0].up.cache.norms[ids] > 0).all() and (model[0].up.cache.norms[0] == -1).all()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = stack(2)

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.skipif(DEVICE != "cpu", reason="peft's layers stand on the CPU here")
def test_lora():
    """peft's frozen layers keep nothing, lora_A a sample of its input; its gradient alone is an estimate."""
    import peft  # seconds, that no other test needs

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "up"], init_lora_weights=False)
    model = peft.get_peft_model(Encoder(), config)
    x = batch()
    full = kept_bytes(model, x)
    exact, expected = gradients(model, x), model(x)
    convert_linear(model, ratio=0.1, include="*lora_A*")
    kinds = [type(m.lora_A["default"]) for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    assert kinds == [WTACRSLinear] * 6
    assert torch.equal(model(x), expected)
    ours = kept_bytes(model, x)
    # Beside the inputs of lora_A stand those of lora_B, 4 wide.
    n, k = 4 * TOKENS, 4 * TOKENS // 10
    of_lora_b = 6 * n * 4 * 4
    assert full - of_lora_b == 2 * 2 * n * WIDTH * 4  # h for q and v, h for up
    assert ours - of_lora_b == 6 * k * (WIDTH * 4 + 8)
    found = gradients(model, x)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.equal(found[name], gradient) == ("lora_A" not in name), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WTACRSLinear(4, 4, ratio=0.0), r"nn.WTACRSLinear: expected ratio to be a number in \(0, 1\], got 0.0"),
        (lambda: WTACRSLinear(4, 4, ratio=0.5, method="top"), "systematic, wta, crs, got 'top'"),
        (lambda: SampledGroup([nn.Linear(4, 4), nn.Linear(5, 4)], ratio=0.5), r"equal in_features, got \[4, 5\]"),
        (lambda: SampledGroup([], ratio=0.5), r"got \[\]"),
        (lambda: SampledGroup([nn.Linear(4, 4)], ratio=0.5, caches=[]), "expected 1 caches, got 0"),
        (lambda: convert_linear(nn.Sequential(nn.ReLU()), ratio=0.5), "the model to have an nn.Linear that"),
        (lambda: convert_linear(Block(), ratio=0.5, include="x"), r"\('x',\)"),
        (lambda: convert_linear(Block(), ratio=0.5, groups=[("up", "down")]), "to have equal in_features"),
        (lambda: convert_linear(Block(), ratio=0.5, groups=[("a", "b")]), r"names \('a', 'b'\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_option_leaves_a_layer_alone():
    layer = nn.Linear(4, 4)
    for function in (convert_linear, lambda layer, **options: SampledGroup([layer], **options)):
        with pytest.raises(ValueError, match="got 'top'"):
            function(layer, ratio=0.5, method="top")
    assert type(layer) is nn.Linear and vars(layer).keys() == vars(nn.Linear(4, 4)).keys()
    with pytest.raises(TypeError, match=r"expected layers to be nn\.Linear, got Identity, WTACRSLinear"):
        SampledGroup([WTACRSLinear(4, 4, ratio=0.5), nn.Identity()], ratio=0.5)
