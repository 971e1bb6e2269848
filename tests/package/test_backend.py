"""Switching backends: who computes, who comes back, and why one cannot be had."""

import importlib
import inspect
import os
import subprocess
import sys
import threading

import pytest
import torch

import tilewise
from tilewise.ops import register
from tilewise.reference import z_loss as z_loss_reference

module = importlib.import_module("tilewise.backend")
ops = torch.ops.tilewise
OPERATORS = sorted(name for name in module._implementations("tilewise.reference") if not module._composite(name))


@pytest.fixture
def loss():
    """A function that computes a loss on the CPU with whatever backend is in use."""
    logits, target = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([1])
    return lambda: ops.spherical_softmax_loss(logits, target, eps=0.0)[0].item()


@pytest.fixture
def fake_reference(monkeypatch):
    """Makes the reference recognisable: its spherical softmax loss is 42."""

    def fake(logits, target, *, eps, ignore_index, reduction):
        return torch.tensor(42.0), logits.new_zeros(4 * len(logits) + 1)

    monkeypatch.setitem(z_loss_reference.OPS, "spherical_softmax_loss", fake)


COMPILED = pytest.approx(torch.log(torch.tensor(21 / 4)).item())  # -log(2^2 / (1 + 2^2 + 4^2))


def test_reference_replaces_the_compiled_kernel_and_leaves_again(loss, fake_reference):
    assert loss() == COMPILED
    with tilewise.backend("reference"):
        assert loss() == 42.0
        with tilewise.backend("cpu"):
            assert loss() == COMPILED
        assert loss() == 42.0
    assert loss() == COMPILED


def test_acts_at_once_without_with(loss, fake_reference):
    chosen = tilewise.backend("reference")
    try:
        assert loss() == 42.0
        assert module.current() == "reference"
    finally:
        tilewise.backend("auto")
    assert chosen.name == "reference"
    assert loss() == COMPILED


def test_one_object_serves_again_and_inside_itself(loss, fake_reference):
    chosen = tilewise.backend("reference")
    for _ in range(2):
        with chosen:
            assert loss() == 42.0
            with chosen:
                assert loss() == 42.0
            assert loss() == 42.0
        assert loss() == COMPILED


def test_blocks_may_overlap(loss, fake_reference):
    first, second = tilewise.backend("reference"), tilewise.backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (loss(), module.current()) == (COMPILED, "cpu")
    second.__exit__(None, None, None)
    assert (loss(), module.current()) == (COMPILED, "auto")


def test_a_choice_inside_a_block_ends_with_it(loss, fake_reference):
    with tilewise.backend("cpu"):
        tilewise.backend("reference")
        assert loss() == 42.0
    assert loss() == COMPILED


def test_a_failing_switch_leaves_the_old_backend(loss, fake_reference, monkeypatch):
    with tilewise.backend("reference"):
        with monkeypatch.context() as broken:
            broken.setattr(register.autocast, "unaware", lambda function: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                with tilewise.backend("reference"):
                    pass
        assert loss() == 42.0
    assert loss() == COMPILED


def test_threads_may_switch_one_after_the_other(loss, fake_reference):
    def choose():
        for _ in range(20):
            with tilewise.backend("reference"):
                pass

    threads = [threading.Thread(target=choose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (loss(), module.current()) == (COMPILED, "auto")


def test_an_exception_restores_too(loss, fake_reference):
    with pytest.raises(KeyError), tilewise.backend("reference"):
        raise KeyError
    assert loss() == COMPILED


def test_unknown_name():
    expected = "tilewise.backend: expected one of auto, cuda, triton, cpu, reference, got 'gpu'"
    with pytest.raises(ValueError, match=expected):
        tilewise.backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("cuda", "the CUDA library is not loaded: .+|torch sees no GPU"), ("triton", ".*GPU|Triton is.*")],
)
def test_without_a_gpu_the_reason_is_given(name, reason, monkeypatch, loss):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"tilewise.backend: '{name}' cannot be used: ({reason})$"):
        tilewise.backend(name)
    assert module.current() == "auto"
    assert loss() == COMPILED


@pytest.fixture
def no_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "triton" and find(name, *rest))


def test_without_triton_the_reason_is_given(no_triton):
    expected = r"'triton' cannot be used: Triton is not installed \(pip install triton\)"
    with pytest.raises(RuntimeError, match=expected):
        tilewise.backend("triton")


def test_auto_without_library_and_triton_refuses_cuda_tensors(no_triton, monkeypatch):
    monkeypatch.setitem(module.loading.why_not_loaded, "tilewise_cuda", "not built (a reason)")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    served, functions = module._plan("auto")
    reason = "the CUDA library is not loaded: not built (a reason), and Triton is not installed (pip install triton)"
    assert served["CUDA"] == f"nothing: {reason}"
    assert served["CPU"].startswith("C++")
    assert sorted(functions["CUDA"]) == OPERATORS
    with pytest.raises(RuntimeError) as error:
        functions["CUDA"]["z_loss"](None)
    assert str(error.value) == f"tilewise.z_loss: no kernel for CUDA tensors: {reason}"


def test_auto_without_library_takes_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(module.loading.why_not_loaded, "tilewise_cuda", "not built (a reason)")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    served, functions = module._plan("auto")
    assert served["CUDA"] == "Triton"
    assert sorted(functions["CUDA"]) == OPERATORS


def run(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)


def test_switching_warns_of_nothing():
    code = """
import tilewise
for name in ("reference", "cpu", "reference", "auto"):
    print(tilewise.backend(name))
"""
    result = run(code, PYTHONWARNINGS="error")
    assert result.stderr == ""
    assert result.stdout.splitlines()[0] == "tilewise.backend('reference')"


def test_environment_variable_sets_the_backend():
    code = "import tilewise; from tilewise.backend import current, served; print(current(), served()['CPU'])"
    assert run(code, TILEWISE_BACKEND="reference").stdout == "reference PyTorch reference\n"
    wrong = run("import tilewise", TILEWISE_BACKEND="gpu").stderr
    assert wrong.endswith(
        "ValueError: tilewise.backend: expected one of auto, cuda, triton, cpu, reference, got 'gpu'\n"
    )


def test_triton_interpreter_serves_cpu_tensors():
    pytest.importorskip("triton")
    code = """
import torch, tilewise
from tilewise.backend import served
logits, target = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([1])
with tilewise.backend("triton"):
    print(served()["CPU"])
    print(torch.ops.tilewise.spherical_softmax_loss(logits, target, eps=0.0)[0].item())
print(served()["CPU"].split()[0])
"""
    result = run(code, TRITON_INTERPRET="1")
    inside, value, outside = result.stdout.splitlines()
    assert (inside, outside) == ("Triton interpreter", "C++"), result.stderr
    assert float(value) == COMPILED


@pytest.mark.parametrize("package", ["tilewise.reference", "tilewise.triton_kernels"])
def test_every_operator_has_an_implementation_that_takes_its_arguments(package):
    if package == "tilewise.triton_kernels":
        pytest.importorskip("triton")
    defined = {
        name.removeprefix("tilewise::") for name in torch._C._dispatch_get_all_op_names() if "tilewise::" in name
    }
    implementations = module._implementations(package)
    if package == "tilewise.triton_kernels":
        defined = {name for name in defined if not module._composite(name)}
    assert set(implementations) <= defined and defined - set(implementations) <= register.COMPOSITE
    for name, function in implementations.items():
        arguments = getattr(ops, name).default._schema.arguments
        positional = [a.name for a in arguments if not a.kwarg_only]
        inspect.signature(function).bind(*positional, **{a.name: a.name for a in arguments if a.kwarg_only})
