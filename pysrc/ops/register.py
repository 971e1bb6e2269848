"""The one place that registers at torch.library: how an operator is differentiated, mapped, traced and counted.

An operator's module says what is its own (shapes, a backward, a count of products); what all share stands here.
A derivative is a Python kernel on the Autograd key that applies an autograd.Function of a single level: below it the
call goes to the next transform of torch.func, or to the kernel of the device, as with PyTorch's own operators. What has
no derivative says so, in reverse and in forward mode.
"""

import functools
import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C._functorch import (
    get_single_level_autograd_function_allowed,
    set_single_level_autograd_function_allowed,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from tilewise import loading
from tilewise.ops import autocast, schema

loading.load_libraries()

COMPOSITE: set[str] = set()  # operators that need no reference, for they are PyTorch's and others of tilewise's
_library = torch.library.Library("tilewise", "IMPL")
_traced_library = torch.library.Library("tilewise_traced", "FRAGMENT")  # opcheck takes no operator with overloads
_functions: dict[torch._ops.OpOverload, Callable] = {}  # that record a derivative, or the refusal of one
_serving: torch.library.Library | None = None  # the kernels put over the compiled ones


def overload_of(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.tilewise, op).default


def operator(op: str) -> Callable:
    """An operator to be called from Python: torch.ops.tilewise.<op> without the detour over the dispatcher's Autograd
    key, which costs as much as a small kernel. Tracers and torch.func need the detour."""
    traced, direct = _traced(op), _direct(op, overload_of(op))

    def call(*inputs, **options):
        if is_compiling() or transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
            return traced(inputs, options)
        return direct(inputs, options)

    return call


def _traced(op: str) -> Callable:
    """Calls the operator for a tracer. A float of a graph is a constant of it, and another value another graph: those
    that change are handed over as tensors, to an overload that takes them."""
    overload, floats = overload_of(op), [a.name for a in schema.schema_of(op) if _is_float(a)]
    if not floats:
        return lambda inputs, options: overload(*inputs, **options)
    with_tensors = _overload_with_tensors(op)

    def traced(inputs: tuple, options: dict):
        given = {name: options[name] for name in floats if options.get(name) is not None}
        if not any(isinstance(v, Tensor) or _changes(v) for v in given.values()):
            return overload(*inputs, **options)
        held = {name: v if isinstance(v, Tensor) else as_tensor(v) for name, v in given.items()}
        return with_tensors(*inputs, **(options | held))

    return traced


def as_tensor(number: float, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """A number as a tensor of no dimensions, by an operation that lets a tracer keep it apart from the graph."""
    if _changes(number):
        return torch.ones((), dtype=dtype, device=device) * number
    return torch.full((), number, dtype=dtype, device=device)


def _changes(number: float) -> bool:
    """Whether a tracer knows the number as a symbol: in a compilation, which has imported what tells."""
    return is_compiling() and not torch.fx.experimental.symbolic_shapes.has_static_value(number)


def _is_float(argument) -> bool:
    return argument.kwarg_only and str(argument.type) in ("float", "Optional[float]")


@functools.cache
def _overload_with_tensors(op: str) -> torch._ops.OpOverload:
    """The operator with tensors on the CPU in the place of its floats."""
    overload = overload_of(op)
    text = re.sub(r"\bfloat\?? (\w+)(=[^,)]*)?", r"Tensor? \1=None", str(overload._schema).removeprefix("tilewise::"))
    _traced_library.define(text)
    fill = _filler(op)

    def with_numbers(number_of: Callable) -> Callable:
        def call(*inputs, **options):
            *inputs, options = fill(inputs, options)
            return overload(*inputs, **{k: number_of(v) if isinstance(v, Tensor) else v for k, v in options.items()})

        return call

    _traced_library.impl(op, with_numbers(Tensor.item), "CompositeExplicitAutograd")
    _traced_library.impl(op, with_numbers(lambda tensor: 1.0), "Meta")
    return getattr(torch.ops.tilewise_traced, op).default


def _direct(op: str, overload: torch._ops.OpOverload) -> Callable:
    """Calls the operator's derivative where something records, else the kernel of the device."""
    run, fill, plain = overload._op, _filler(op), _plain(op, overload)

    def direct(inputs: tuple, options: dict):
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return _functions[overload](*fill(inputs, options))
        with torch._C._AutoDispatchBelowAutograd():
            if not options or options == plain:  # parsing options takes its time
                return run(*inputs)
            return run(*inputs, **options)

    return direct


def defaults(op: str) -> dict | None:
    """The options of an operator that has a default for each."""
    options = [a for a in schema.schema_of(op) if a.kwarg_only]
    return {a.name: a.default_value for a in options} if all(a.has_default_value() for a in options) else None


def _plain(op: str, overload: torch._ops.OpOverload) -> dict | None:
    """Options that need not be handed over; none where they may be tensors, which a tracer cannot compare."""
    return defaults(op) if overload is overload_of(op) else None


def _positional(op: str) -> list[tuple[str, object]]:
    """Names and defaults of the arguments that are no options."""
    return [(a.name, a.default_value) for a in schema.schema_of(op) if not a.kwarg_only]


def _filler(op: str) -> Callable:
    """Of what fills in the arguments that the dispatcher, or a caller, left out because they are their defaults."""
    positional = _positional(op)
    others = {a.name: a.default_value for a in schema.schema_of(op) if a.kwarg_only}

    def fill(inputs: tuple, options: dict) -> tuple:
        if len(inputs) < len(positional):
            inputs = (*inputs, *(options.pop(name, default) for name, default in positional[len(inputs) :]))
        return *inputs, others | options

    return fill


def autograd(
    op: str,
    backward: Callable,
    setup_context: Callable,
    jvp: Callable | None = None,
    *,
    outputs: tuple[int, ...] | None = None,
) -> None:
    """Gives an operator its derivatives.

    Args:
        setup_context: (ctx, inputs, options, output), with every input and option of the schema; it must save all that
            backward needs with ctx.save_for_backward or as an attribute.
        backward: (ctx, *grads) -> a gradient or None for every input; at least one grad is not None.
        jvp: (ctx, *tangents) -> a tangent or None for every output; None refuses forward mode (derivatives.of_losses
            has that of losses).
        outputs: the places of those that have a derivative, and so a grad and a tangent: all by default.
    """
    overloads = [(_library, overload_of(op))]
    if any(_is_float(a) for a in schema.schema_of(op)):
        overloads.append((_traced_library, _overload_with_tensors(op)))
    returned = overload_of(op)._schema.returns
    places = tuple(range(len(returned))) if outputs is None else outputs
    for library, overload in overloads:
        function = _function(op, overload, backward, setup_context, jvp, places)
        _functions[overload] = _recorded(function, places) if len(returned) > 1 else function.apply
        library.impl(op, _autograd_kernel(_direct(op, overload)), "Autograd")


def _recorded(function: type[_SingleLevelFunction], places: tuple[int, ...]) -> Callable:
    """Calls a function of several outputs. Those without a derivative go past autograd: marking them costs more."""

    def call(*arguments) -> tuple:
        results: list[Tensor] = []
        recorded = function.apply(*arguments, results)
        if isinstance(recorded, Tensor):
            results[places[0]] = recorded
        else:
            for place, result in zip(places, recorded, strict=True):
                results[place] = result
        return tuple(results)

    return call


def _autograd_kernel(direct: Callable) -> Callable:
    def kernel(*inputs, **options):
        allowed = get_single_level_autograd_function_allowed()
        set_single_level_autograd_function_allowed(True)
        try:
            return direct(inputs, options)
        finally:
            set_single_level_autograd_function_allowed(allowed)

    return kernel


def _function(
    op: str, overload, backward: Callable, setup_context: Callable, jvp: Callable | None, places: tuple[int, ...]
) -> type[_SingleLevelFunction]:
    """Takes inputs, options and, if there are several outputs, a list for them; returns those at places."""
    run, plain, n_inputs = overload._op, _plain(op, overload), len(_positional(op))

    def forward(ctx, *arguments):
        inputs, options = arguments[:n_inputs], arguments[n_inputs]
        if transforms_active():  # the next level records, too
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs, **options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*inputs) if options == plain else run(*inputs, **options)
        setup_context(ctx, inputs, options, output)
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            arguments[-1].extend(output)
            output = tuple(output[place] for place in places) if len(places) > 1 else output[places[0]]
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*getattr(ctx, "to_save", None) or ())
            results = (output,) if isinstance(output, Tensor) else output
            ctx.results = [(r.shape, r.dtype, r.device) for r in results]
        return output

    nothing = (None,) * (1 if len(overload._schema.returns) == 1 else 2)  # for the arguments that are no inputs

    def of_inputs(ctx, *grads):
        if grads[0] is None and all(grad is None for grad in grads):
            return (*(None,) * n_inputs, *nothing)
        gradients = backward(ctx, *grads)
        return (*gradients, *nothing) if isinstance(gradients, tuple) else (gradients, *nothing)

    def forward_mode(ctx, *tangents):
        if jvp is None:
            raise RuntimeError(
                f"tilewise.{op}: no derivative in forward mode (torch.func.jvp, jacfwd); reverse mode has it"
            )
        return jvp(ctx, *tangents[:n_inputs])

    rules = {"forward": forward, "backward": of_inputs, "jvp": forward_mode}
    return type(op, (_SingleLevelFunction,), {name: staticmethod(rule) for name, rule in rules.items()})


def fake(op: str) -> Callable[[Callable], Callable]:
    """Registers what tells the shapes of an operator's results; it is given all arguments. It serves every call with a
    meta tensor, so it is here that one beside tensors of another device is refused: their results would have memory
    that nobody writes."""

    fill = _filler(op)

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def checked(*arguments, **options):
            *arguments, options = fill(arguments, options)
            schema.checked_tensors(op, arguments, options)
            return function(*arguments, **options)

        torch.library.register_fake(f"tilewise::{op}", checked, lib=_library)
        if not overload_of(op)._schema.is_mutable:
            torch.library.register_vmap(f"tilewise::{op}", functools.partial(_one_by_one, op), lib=_library)
        return function

    return register


def _one_by_one(op: str, info, in_dims: tuple[int | None, ...], *inputs, **options):
    """torch.vmap of any operator: one call for each example."""
    if info.batch_size == 0:
        raise RuntimeError(f"tilewise.{op}: expected at least one example in torch.vmap, got none")
    overload = overload_of(op)

    def example(i: int):
        return overload(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)), **options
        )

    examples = [example(i) for i in range(info.batch_size)]
    if isinstance(examples[0], Tensor):
        return torch.stack(examples), 0
    results = tuple(torch.stack(parts) for parts in zip(*examples, strict=True))
    return results, (0,) * len(results)


def flops(*ops: str) -> Callable[[Callable], Callable]:
    """Registers what torch.utils.flop_counter counts: a function of the operator's arguments, shapes in the place of
    tensors, and of out_shape."""

    def register(function: Callable) -> Callable:
        register_flop_formula([getattr(torch.ops.tilewise, op) for op in ops])(function)
        return function

    return register


def composite(op: str, function: Callable, shapes: str = "") -> None:
    """An operator of PyTorch's own and of tilewise's: one implementation for every device, without autocast.

    Args:
        shapes: its tensors and their sizes, as in ``"hidden n D, weight V D, #target n"``: equal letters are equal
            sizes, a capital one is at least 1, D+1 is one more than D, # marks int64, all others are floating.
    """

    fill = _filler(op)

    @functools.wraps(function)
    def alone(*arguments, **options):
        *arguments, options = fill(arguments, options)
        tensors = schema.checked_tensors(op, arguments, options)
        schema.check_shapes(op, tensors, shapes)
        with torch.no_grad(), autocast.off(next(iter(tensors.values())).device.type):
            return function(*arguments, **options)

    _library.impl(op, alone, "CompositeExplicitAutograd")
    COMPOSITE.add(op)


def implicit(op: str, function: Callable) -> None:
    """A public function whose autograd is that of the operators in it."""
    _library.impl(op, function, "CompositeImplicitAutograd")
    COMPOSITE.add(op)


def writes(op: str, place: int) -> None:
    """An operator that writes to an argument: a compiled one does not bump its version by itself, and whoever saved
    the tensor would silently read what was written."""
    overload = overload_of(op)

    def bump(keyset, *inputs, **options):
        torch.autograd.graph.increment_version(inputs[place])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *inputs, **options)

    _library.impl(op, bump, "ADInplaceOrView", with_keyset=True)


def serve(kernels: dict[str, dict[str, Callable]]) -> None:
    """Puts Python kernels, by dispatch key and operator, over the compiled ones, in the place of those put there
    before: where there are none any more, the compiled kernels are back."""
    global _serving
    library = torch.library.Library("tilewise", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
        for key, operators in kernels.items():
            for op, function in operators.items():
                library.impl(op, _with_defaults(op, autocast.unaware(function)), key)
    _serving = library


def _with_defaults(op: str, function: Callable) -> Callable:
    """A function of all arguments of an operator, called without those that are their defaults."""
    fill = _filler(op)

    def call(*inputs, **options):
        *inputs, options = fill(inputs, options)
        return function(*inputs, **options)

    return call
