"""Linear layers that keep a sample of their input for the gradient of the weight."""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from tilewise.ops import wta_crs
from tilewise.ops.wta_crs import RowSample

Names = str | Sequence[str] | None


class NormCache(nn.Module):
    """For every sample and token the norm of an output's gradient at the last visit: what the next sample goes by.

    A buffer, so in the state_dict and on the device of the model; it is read in a forward and written in a backward,
    without waiting for a device. A sample that is new has the mean norm of the others of its batch. Under
    DistributedDataParallel every rank has samples of its own: pass ``broadcast_buffers=False``, from torch 2.13 on
    ``forward_sync_buffers=False``; else all ranks go by the norms of the first, without bias, but with more variance.

    Args:
        samples: how many the data set has.
        tokens: the most that a sample has; 1 for inputs (batch, features).
        dtype: of the table, samples x tokens numbers.
    """

    def __init__(self, samples: int, tokens: int = 1, *, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.register_buffer("norms", torch.full((samples, tokens), -1, dtype=dtype))  # below 0: not seen yet

    def read(self, ids: Tensor, tokens: int) -> Tensor:
        """(b, tokens) float32."""
        known = self.norms[ids, :tokens].float()
        seen = known >= 0
        count = seen.sum()
        mean = torch.where(count > 0, torch.where(seen, known, 0).sum() / count, 1)
        return torch.where(seen, known, mean)

    def extra_repr(self) -> str:
        return f"samples={self.norms.shape[0]}, tokens={self.norms.shape[1]}, dtype={self.norms.dtype}"


class WTACRSLinear(nn.Linear):
    """nn.Linear that keeps a share of the rows of its input for the gradient of the weight.

    Results and the gradients of input and bias are those of nn.Linear bit by bit; the weight's is estimated without
    bias (:func:`tilewise.wta_crs_linear`). In evaluation, and where the weight needs no gradient, it is nn.Linear, and
    so it is for a call of fewer rows than it would keep. Parameters and their names are those of nn.Linear: a
    checkpoint of one loads into the other, up to the cache.

    From "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model" (Liu et al., 2023).

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        ratio: in (0, 1], of the rows of a call, that are kept.
        method, mix: as for :func:`tilewise.wta_crs_sample`.
        cache: a :class:`NormCache` for gradients of known samples: x is then (b, tokens, in_features), or (b,
            in_features) with one token, and :func:`set_sample_ids` says whose it is. None: rows count by the norm of x
            alone.

    Example:
        >>> import torch, tilewise
        >>> layer = tilewise.nn.WTACRSLinear(16, 8, ratio=0.1)
        >>> layer(torch.randn(4, 50, 16)).square().sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ratio: float,
        method: str = "systematic",
        mix: float = 0.05,
        cache: NormCache | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._sample_by(ratio, method, mix, cache)

    def _sample_by(self, ratio: float, method: str, mix: float, cache: NormCache | None) -> None:
        wta_crs.check_ratio("nn.WTACRSLinear", ratio)
        wta_crs.check_options("nn.WTACRSLinear", method, mix)
        self.ratio, self.method, self.mix, self.cache = ratio, method, mix, cache
        self.sample_ids: Tensor | None = None
        self.shared: _Shared | None = None

    @classmethod
    def of_linear(
        cls, layer: nn.Linear, ratio: float, method: str, mix: float, cache: NormCache | None
    ) -> "WTACRSLinear":
        """The layer itself, which becomes one of these: parameters, hooks and whoever holds it stay."""
        cls._sample_by(layer, ratio, method, mix, cache)  # first, as it may refuse an option
        layer.__class__ = cls
        return layer

    def to_linear(self) -> nn.Linear:
        """The layer itself, which becomes a plain one; its type must be this, not one that another made of it."""
        for name in ("ratio", "method", "mix", "cache", "sample_ids", "shared"):
            delattr(self, name)
        self.__class__ = nn.Linear
        return self

    @property
    def is_sampling(self) -> bool:
        return self.training and self.weight.requires_grad and torch.is_grad_enabled()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_sampling:
            return functional.linear(x, self.weight, self.bias)
        sample = _draw(x, [self]) if self.shared is None else self.shared.draw(self, x)
        record = None if self.cache is None else (self.cache.norms, self.ids_of(x))
        return wta_crs.wta_crs_linear(x, self.weight, self.bias, sample=sample, record=record)

    def ids_of(self, x: Tensor) -> Tensor:
        ids = self.sample_ids
        if ids is None:
            raise ValueError(
                "tilewise.nn.WTACRSLinear: expected to know the samples of a call: it has a cache, "
                "so call tilewise.nn.set_sample_ids(model, ids) before"
            )
        if x.dim() not in (2, 3) or len(ids) != len(x):
            raise ValueError(
                f"tilewise.nn.WTACRSLinear: expected x of {len(ids)} samples, (b, tokens, features) or (b, features), "
                f"got {tuple(x.shape)}"
            )
        return ids

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, method={self.method!r}"


def _draw(x: Tensor, layers: list[WTACRSLinear]) -> RowSample:
    """One sample for layers with one input, by the root of the sum of the squares of their gradients' norms."""
    tokens = x.shape[1] if x.dim() == 3 else 1
    known = [layer.cache.read(layer.ids_of(x), tokens) for layer in layers if layer.cache is not None]
    norms = torch.stack(known).square().sum(0).sqrt() if known else None
    first = layers[0]
    return wta_crs.wta_crs_sample(x, ratio=first.ratio, norms=norms, method=first.method, mix=first.mix)


class _Shared:
    """The sample of layers that are called one after another with one tensor: drawn for the first of them, and let go
    with the last or, where a layer is left out, with the tensor, which is not held."""

    def __init__(self, layers: Sequence[WTACRSLinear]):
        self.layers = list(layers)
        self.x: weakref.ref[Tensor] | None = None
        self.version = 0
        self.sample: RowSample | None = None
        self.waiting: list[WTACRSLinear] = []

    def draw(self, layer: WTACRSLinear, x: Tensor) -> RowSample:
        version = 0 if torch.compiler.is_compiling() else x._version  # whether x was written to since
        if self.x is None or x is not self.x() or version != self.version or layer not in self.waiting:
            self.waiting = [member for member in self.layers if member.is_sampling]
            self.x, self.version, self.sample = weakref.ref(x, self._let_go), version, _draw(x, self.waiting)
        sample = self.sample
        self.waiting = [member for member in self.waiting if member is not layer]
        if not self.waiting:
            self.x = self.sample = None
        return sample

    def _let_go(self, x: weakref.ref) -> None:
        if x is self.x:
            self.x = self.sample = None

    def __getstate__(self) -> dict:
        return vars(self) | {"x": None, "sample": None, "waiting": []}


def _share(layers: Sequence[WTACRSLinear]) -> None:
    shared = _Shared(layers)
    for layer in layers:
        layer.shared = shared


class SampledGroup(nn.Module):
    """Linear layers with one input, such as q, k and v, or gate and up, which share one sample of it.

    Samples of their own would hold three times the rows. Where the layers are attributes of a model that calls them
    itself, ``convert_linear(model, groups=...)`` does the same in place.

    Args:
        layers: nn.Linear of equal in_features, which become :class:`WTACRSLinear`.
        ratio, method, mix: as for :class:`WTACRSLinear`.
        caches: a :class:`NormCache` for each, or None.

    Example:
        >>> import torch, tilewise
        >>> group = tilewise.nn.SampledGroup([torch.nn.Linear(16, 16) for _ in range(3)], ratio=0.1)
        >>> q, k, v = group(torch.randn(4, 50, 16))
    """

    def __init__(
        self,
        layers: Iterable[nn.Linear],
        *,
        ratio: float,
        method: str = "systematic",
        mix: float = 0.05,
        caches: Sequence[NormCache | None] | None = None,
    ):
        super().__init__()
        layers = list(layers)
        if kinds := sorted({type(layer).__name__ for layer in layers if type(layer) is not nn.Linear}):
            raise TypeError(f"tilewise.nn.SampledGroup: expected layers to be nn.Linear, got {', '.join(kinds)}")
        if not layers or len({layer.in_features for layer in layers}) != 1:
            sizes = [layer.in_features for layer in layers]
            raise ValueError(f"tilewise.nn.SampledGroup: expected layers of equal in_features, got {sizes}")
        caches = [None] * len(layers) if caches is None else caches
        if len(caches) != len(layers):
            raise ValueError(f"tilewise.nn.SampledGroup: expected {len(layers)} caches, got {len(caches)}")
        self.layers = nn.ModuleList(
            WTACRSLinear.of_linear(layer, ratio, method, mix, cache)
            for layer, cache in zip(layers, caches, strict=True)
        )
        _share(list(self.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def convert_linear(
    model: nn.Module,
    *,
    ratio: float,
    include: Names = None,
    exclude: Names = None,
    groups: Sequence[Sequence[str]] = (),
    method: str = "systematic",
    mix: float = 0.05,
    samples: int | None = None,
    tokens: int = 1,
) -> nn.Module:
    """Turns the nn.Linear of a model into :class:`WTACRSLinear` with the same parameters, in place.

    Layers, parameters and hooks stay the same objects, also to an optimizer; compile the model afterwards. With LoRA,
    whose frozen weights keep nothing, ``include="*lora_A*"`` samples the input that lora_A keeps. Layers of a subclass
    of nn.Linear and transformers' Conv1D stay as they are; a warning lists those that `include` names and `exclude`
    does not.

    Args:
        model: any module.
        ratio, method, mix: as for :class:`WTACRSLinear`.
        include, exclude: shell patterns (``"layers.*.q_proj"``) for names in model.named_modules(): which layers are
            converted (None: all), and which of these are not.
        groups: sets of attribute names that lie beside each other and get one input in one forward, such as
            ``[("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]``: they share one sample.
        samples, tokens: with the size of the data set every layer gets a :class:`NormCache` of its own.

    Returns:
        The model.

    Raises:
        ValueError: an option is not as above, nothing was converted, or the members of a group differ in in_features.

    Example:
        >>> import torch, tilewise
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> tilewise.nn.convert_linear(model, ratio=0.3, exclude="2")
        Sequential(
          (0): WTACRSLinear(in_features=8, out_features=32, bias=True, ratio=0.3, method='systematic')
          (1): ReLU()
          (2): Linear(in_features=32, out_features=2, bias=True)
        )
    """
    include, exclude = (_patterns(names, default) for names, default in ((include, ("*",)), (exclude, ())))
    converted: dict[str, WTACRSLinear] = {}
    left: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not _matches(name, include) or _matches(name, exclude):
            continue
        if type(layer) is nn.Linear:
            cache = None if samples is None else NormCache(samples, tokens).to(layer.weight.device)
            WTACRSLinear.of_linear(layer, ratio, method, mix, cache)
            converted[name] = layer
        elif layer in converted.values():  # under another name
            converted[name] = layer
        elif type(layer).__name__ == "Conv1D" or (isinstance(layer, nn.Linear) and type(layer) is not WTACRSLinear):
            left[name] = layer
    if not converted:
        found = f", got {_kinds(left)}" if left else ""
        raise ValueError(
            f"tilewise.nn.convert_linear: expected the model to have an nn.Linear that {include} names{found}"
        )
    if left:
        warnings.warn(f"tilewise.nn.convert_linear: no nn.Linear, and left as they are: {_kinds(left)}", stacklevel=2)
    for names in groups:
        _group(converted, names)
    return model


def _group(converted: dict[str, WTACRSLinear], names: Sequence[str]) -> None:
    parents = {name.rpartition(".")[0] for name in converted}
    found = False
    for parent in parents:
        members = [converted.get(f"{parent}.{name}".lstrip("."), None) for name in names]
        members = [member for member in members if member is not None]
        if len(members) < 2:
            continue
        found = True
        if len({member.in_features for member in members}) != 1:
            raise ValueError(f"tilewise.nn.convert_linear: expected {names} of {parent!r} to have equal in_features")
        _share(members)
    if not found:
        raise ValueError(f"tilewise.nn.convert_linear: expected converted layers with the names {tuple(names)}")


def restore_linear(model: nn.Module) -> nn.Module:
    """Turns every :class:`WTACRSLinear` of a model back into nn.Linear, in place; caches are dropped.

    Raises:
        ValueError: something else (a parametrization such as weight_norm, fully_shard) made another class of a layer,
            which has to be undone first. No layer is changed then.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WTACRSLinear)}
    if other := {name: layer for name, layer in layers.items() if type(layer) is not WTACRSLinear}:
        raise ValueError(
            f"tilewise.nn.restore_linear: expected every layer to be WTACRSLinear itself, got {_kinds(other)}: "
            "undo first what made these classes (parametrizations, fully_shard)"
        )
    for layer in layers.values():
        layer.to_linear()
    return model


def set_sample_ids(model: nn.Module, ids: Tensor) -> None:
    """Says which samples of the data set the next calls are about, to every layer of a model with a cache.

    Args:
        model: has layers of :func:`convert_linear` with `samples`.
        ids: (b,) int64, in [0, samples), on the device of the model; they hold until the next are set, as gradient
            checkpointing asks for them again in the backward.

    Raises:
        ValueError: ids are not as above (on a GPU another id is an assertion of the device, as in indexing).
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype != torch.int64:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"tilewise.nn.set_sample_ids: expected ids to be int64 of shape (b,), got {got}")
    layers = [layer for layer in model.modules() if isinstance(layer, WTACRSLinear) and layer.cache is not None]
    samples = min((len(layer.cache.norms) for layer in layers), default=0)
    if layers and ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < samples)).all()):
        raise ValueError(f"tilewise.nn.set_sample_ids: expected ids in [0, {samples}), got {ids.tolist()}")
    ids = wta_crs.without_wrapping(ids, samples)
    for layer in layers:
        layer.sample_ids = ids


def _kinds(layers: dict[str, nn.Module]) -> str:
    return ", ".join(f"{name} ({type(layer).__name__})" for name, layer in layers.items())


def _patterns(names: Names, default: tuple[str, ...]) -> tuple[str, ...]:
    if names is None:
        return default
    return (names,) if isinstance(names, str) else tuple(names)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
