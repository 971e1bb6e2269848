"""Under autocast every public function takes floating types side by side, as PyTorch's own do."""

import pytest
import torch
from contract import DEVICE, INTERPRETED
from public_functions import CALLS, names, values_and_gradients
from torch._functorch import config

NARROW = torch.bfloat16
MIXES = {"narrow first": [NARROW, torch.float32] * 2, "wide first": [torch.float32, NARROW] * 2}


def expected(call, tensors):
    """Without autocast, of what is cast by hand."""
    dtype = {"lower": NARROW, "widen": torch.float32}.get(call.cast)
    cast = [t.to(dtype) if dtype and i not in call.weights else t for i, t in enumerate(tensors)]
    return values_and_gradients(call.function(*cast), tensors)


def test_every_function_is_here():
    assert sorted(CALLS) == sorted(names())


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", names())
def test_mixed_types(name, mix):
    call = CALLS[name]
    tensors = call.tensors(MIXES[mix])
    with torch.autocast(DEVICE, dtype=NARROW):
        outputs = call.function(*tensors)
    torch.testing.assert_close(values_and_gradients(outputs, tensors), expected(call, tensors))


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace into the interpreter's NumPy")
@pytest.mark.parametrize("name", [name for name in names() if CALLS[name].fixed_size])
def test_compiled(name):
    torch._dynamo.reset()
    call = CALLS[name]
    tensors = call.tensors(MIXES["narrow first"])
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=NARROW), config.patch(backward_pass_autocast="off"):  # as without compiling
        outputs = compiled(*tensors)
    torch.testing.assert_close(values_and_gradients(outputs, tensors), expected(call, tensors))
