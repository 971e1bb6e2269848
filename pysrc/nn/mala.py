"""Attention layers on magnitude-aware linear attention."""

import torch
from torch import Tensor, nn

from tilewise.ops.mala import mala


class MALAttention(nn.Module):
    """Multi-head :func:`tilewise.mala`; drop-in for common uses of :class:`torch.nn.MultiheadAttention`.

    Args:
        embed_dim: of queries and output.
        num_heads: divides embed_dim.
        bias: of the projections.
        kdim: of keys, embed_dim by default.
        vdim: of values, embed_dim by default.
        batch_first: (B, N, embed_dim) rather than (N, B, embed_dim).
        causal: a query sees the keys up to its own place.
        scale: of the similarities; None is the size of a head ** -0.5.
        eps: see the function.

    Shape:
        query (B, N, embed_dim), key (B, M, kdim), value (B, M, vdim) -> (B, N, embed_dim); without the batch dimension
        too. Linear attention has neither masks nor attention weights: the second result is None.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        causal: bool = False,
        scale: float | None = None,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"tilewise.nn.MALAttention: expected num_heads to divide embed_dim, got {num_heads} and {embed_dim}"
            )
        self.num_heads, self.batch_first, self.causal, self.scale, self.eps = num_heads, batch_first, causal, scale, eps
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, embed_dim, **options)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, embed_dim, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """key and value default to the query, as in self-attention; is_causal adds to the layer's own."""
        if key_padding_mask is not None or attn_mask is not None or need_weights:
            raise ValueError(
                "tilewise.nn.MALAttention: expected no masks and need_weights=False: linear attention never forms the "
                "weights (causal=True is the layer's; pack sequences of different lengths with tilewise.mala)"
            )
        key = query if key is None else key
        value = key if value is None else value
        flip = not self.batch_first and query.dim() == 3

        def heads(x: Tensor, projection: nn.Linear) -> Tensor:
            x = projection(x.transpose(0, 1) if flip else x)
            x = x.unsqueeze(0) if x.dim() == 2 else x
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = heads(query, self.q_proj), heads(key, self.k_proj), heads(value, self.v_proj)
        out = mala(q, k, v, causal=self.causal or is_causal, scale=self.scale, eps=self.eps)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return out.squeeze(0), None
        return (out.transpose(0, 1) if flip else out), None


class MALA(nn.Module):
    """The attention of MALA's vision block: 2-D rotation, a depthwise convolution of the values, an output gate.

    With q, k, v and gate o projected from the tokens of an image,

        out = project((mala(q, k, v, 2-D rotation) + convolution(v)) * o)

    From "Rectifying Magnitude Neglect in Linear Attention" (Fan et al., 2025).

    Args:
        dim: channels.
        num_heads: divides dim into heads of a multiple of 4 channels.
        kernel_size: of the depthwise convolution, odd.
        bias: of the projections.
        eps: see :func:`tilewise.mala`.

    Shape:
        (B, height, width, dim) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 5,
        bias: bool = True,
        *,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads) or kernel_size % 2 == 0:
            raise ValueError(
                "tilewise.nn.MALA: expected heads of a multiple of 4 channels and an odd kernel_size, "
                f"got dim {dim}, num_heads {num_heads} and kernel_size {kernel_size}"
            )
        self.num_heads, self.eps = num_heads, eps
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.qkvo = nn.Linear(dim, 4 * dim, **options)
        self.convolution = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype
        )
        self.proj = nn.Linear(dim, dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[3] != self.proj.in_features:
            raise ValueError(
                f"tilewise.nn.MALA: expected x to have shape (batch, height, width, {self.proj.in_features}), "
                f"got {tuple(x.shape)}"
            )
        b, height, width, dim = x.shape
        q, k, v, gate = self.qkvo(x).chunk(4, -1)
        heads = [t.reshape(b, height * width, self.num_heads, -1).transpose(1, 2) for t in (q, k, v)]
        out = mala(*heads, eps=self.eps, rope=rotation_2d(height, width, dim // self.num_heads, x.device))
        out = out.transpose(1, 2).reshape(b, height, width, dim)
        out = out + self.convolution(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out * gate)


def rotation_2d(height: int, width: int, features: int, device=None) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (height * width, features / 2): the first half of the pairs turns with the row, the other with
    the column."""
    speed = 10000.0 ** -torch.linspace(0, 1, features // 4, device=device)
    rows = torch.arange(height, device=device)[:, None] * speed
    columns = torch.arange(width, device=device)[:, None] * speed
    angle = torch.cat([rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)], -1).flatten(
        0, 1
    )
    return angle.cos(), angle.sin()
