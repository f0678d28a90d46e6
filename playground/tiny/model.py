"""Plain torch versions of the two networks, with the parameter names of the checkpoint format.

They exist for training speed (fused projections, packed question blocks). Evaluation loads the exported files into
transformers' own ``CLIPVisionModel`` and ``LlamaForCausalLM``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from playground.tiny import scenes as sc
from playground.tiny.data import PRESENCE, normalise

OFFSETS = (
    ((0, -1.2), (0, 1.2), (-1.2, 0), (1.2, 0)),
    ((-1.5, -1.5), (-1.5, 1.5), (1.5, -1.5), (1.5, 1.5)),
    ((0, -2.5), (0, 2.5), (-2.5, 0), (2.5, 0)),
)


def frequencies(count: int) -> torch.Tensor:
    """Return the angular frequencies of the position table in radians per patch, highest first."""
    return 1.5 * (0.06 / 1.5) ** (torch.arange(count) / (count - 1))


def sincos_positions(width: int, grid: int = sc.GRID) -> torch.Tensor:
    """Return initial position embeddings (grid * grid, width): sines and cosines of row and column, then zeros."""
    angle = torch.arange(grid)[:, None] * frequencies(width // 8)
    wave = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    rows, cols = wave[:, None].expand(grid, grid, -1), wave[None].expand(grid, grid, -1)
    both = torch.cat([rows, cols], -1).reshape(grid * grid, width // 2)
    return torch.cat([both, torch.zeros_like(both)], -1)


@torch.no_grad()
def look_beside(attention: ClipAttention, offsets: tuple[tuple[float, float], ...], sharpness: float = 1.25) -> None:
    """Initialise every head to attend around a fixed offset (rows, columns), a linear function of the position table.

    A vision transformer trained on little data otherwise uses most of it to learn where its neighbours are.
    """
    width = attention.q_proj.in_features
    size = width // attention.heads
    half, pairs = width // 4, size // 4
    rate = frequencies(width // 8)[:pairs]
    for head, offset in enumerate(offsets):
        query, key = torch.zeros(size, width), torch.zeros(size, width)
        for axis in range(2):
            for i in range(pairs):
                row, col = axis * 2 * pairs + 2 * i, axis * half + 2 * i
                c, s = torch.cos(rate[i] * offset[axis]), torch.sin(rate[i] * offset[axis])
                query[row : row + 2, col : col + 2] = torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
                key[row : row + 2, col : col + 2] = torch.eye(2)
        span = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[span] = sharpness * query + 0.02 * torch.randn(size, width)
        attention.k_proj.weight[span] = sharpness * key + 0.02 * torch.randn(size, width)


class ClipAttention(nn.Module):
    """CLIP self-attention. With ``want``, it also returns the CLS row's probabilities averaged over heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: torch.Tensor, want: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (B, T, D) to the same shape; optionally also return the (B, T) CLS attention."""
        b, t, d = x.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        q, k, v = F.linear(x, weight, bias).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        cls = None
        if want:
            cls = ((q[:, :, :1] @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1)[:, :, 0].mean(1)
        return self.out_proj(out), cls


class ClipLayer(nn.Module):
    """Pre-norm CLIP block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = ClipAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor, want: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one block."""
        out, cls = self.self_attn(self.layer_norm1(x), want)
        x = x + out
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden)), cls


class Tower(nn.Module):
    """CLIP vision transformer on patchified images."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 5):
        super().__init__()
        self.patch = nn.Linear(3 * sc.PATCH**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.3)
        table = torch.cat([torch.zeros(1, width), 1.4 * sincos_positions(width)])
        self.position_embedding = nn.Parameter(table)
        self.pre_layrnorm = nn.LayerNorm(width, eps=1e-5)
        self.layers = nn.ModuleList(ClipLayer(width, heads) for _ in range(layers))
        self.post_layernorm = nn.LayerNorm(width, eps=1e-5)
        for name, p in self.named_parameters():
            if p.dim() == 2 and "layers" in name:
                nn.init.normal_(p, std=0.02 if name.endswith(("out_proj.weight", "fc2.weight")) else width**-0.5 * 0.7)
        self.patch.weight.data[: width // 2] *= 0.1
        self.patch.weight.data[width // 2 :] *= 2.0
        for layer, offsets in zip(self.layers, OFFSETS, strict=False):
            if len(offsets) == heads:
                look_beside(layer.self_attn, offsets)

    def forward(
        self, patches: torch.Tensor, ids: torch.Tensor | None = None, last: bool = True, want: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return features (B, 1 + P, D) of the layer before the last, the last layer's output and the CLS attention."""
        if ids is None:
            ids = torch.arange(sc.GRID**2, device=patches.device).expand(len(patches), -1)
        x = self.patch(normalise(patches)) + self.position_embedding[ids + 1]
        start = (self.class_embedding + self.position_embedding[0]).expand(len(x), 1, -1)
        x = self.pre_layrnorm(torch.cat([start, x], 1))
        cls = None
        for layer in self.layers[:-1]:
            x, cls = layer(x, want and layer is self.layers[-2])
        return x, self.layers[-1](x)[0] if last else None, cls


class TowerHeads(nn.Module):
    """Linear probes that supervise the tower; they are not part of the checkpoint."""

    SIZES = {"shape": len(sc.SHAPES) + 1, "colour": len(sc.COLOURS) + 1, "size": 3, "mark": len(sc.MARKS)}

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, sum(self.SIZES.values()) + 5)
        self.cls_feature = nn.Linear(width, PRESENCE)
        self.cls_last = nn.Linear(width, PRESENCE)


class RMSNorm(nn.Module):
    """Llama's root-mean-square norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class LlamaLayer(nn.Module):
    """Llama block that fuses its projections at run time."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in names})
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )
        self.input_layernorm = RMSNorm(width)
        self.post_attention_layernorm = RMSNorm(width)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Run one block.

        ``mask`` is the additive (B, 1, L, T) bias of the last L rows; the rows before them are causal.
        """
        b, t, d = x.shape
        a = self.self_attn
        weight = torch.cat([a["q_proj"].weight, a["k_proj"].weight, a["v_proj"].weight])
        qk, v = F.linear(self.input_layernorm(x), weight).split([2 * d, d], -1)
        qk = qk.view(b, t, 2 * self.heads, -1)
        half = qk.shape[-1] // 2
        cos, sin = rope
        qk = qk * cos + torch.cat([-qk[..., half:], qk[..., :half]], -1) * sin
        q, k = qk.transpose(1, 2).chunk(2, 1)
        v = v.view(b, t, self.heads, -1).transpose(1, 2)
        n = t - mask.shape[2]
        out = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask)
        if n:
            start = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True)
            out = torch.cat([start, out], 2)
        x = x + a["o_proj"](out.transpose(1, 2).reshape(b, t, d))
        h = self.post_attention_layernorm(x)
        gate, up = F.linear(h, torch.cat([self.mlp["gate_proj"].weight, self.mlp["up_proj"].weight])).chunk(2, -1)
        return x + self.mlp["down_proj"](F.silu(gate) * up)


class Llama(nn.Module):
    """Decoder and projector of the miniature LLaVA."""

    def __init__(self, vocab: int, layers: int, width: int = 128, heads: int = 4, inner: int = 344, vision: int = 128):
        super().__init__()
        self.head_dim = width // heads
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, inner) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.mm_projector = nn.Sequential(nn.Linear(vision, width), nn.GELU(), nn.Linear(width, width))
        for name, p in self.named_parameters():
            if p.dim() == 2 and "mm_projector" not in name:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 if small or "lm_head" in name else width**-0.5)
        for layer in self.layers:
            layer.self_attn["k_proj"].weight.data.copy_(layer.self_attn["q_proj"].weight.data)

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine (B, T, 1, head_dim) for explicit positions."""
        rate = 10000.0 ** (-torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim)
        angle = positions[..., None].float() * rate
        angle = torch.cat([angle, angle], -1)[:, :, None]
        return angle.cos(), angle.sin()

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the normalised final hidden states, and the hidden states after every layer."""
        rope, states = self.rope(positions), [embeds]
        for layer in self.layers:
            states.append(layer(states[-1], rope, mask))
        return self.norm(states[-1]), states[1:]

    def deepened(self, times: int) -> Llama:
        """Return a deeper copy that computes the same function.

        Each layer is repeated ``times`` times; the output projections of the added copies are zero.
        """
        first = self.layers[0]
        inner, width = first.mlp["gate_proj"].weight.shape
        new = Llama(
            len(self.embed_tokens.weight),
            times * len(self.layers),
            width,
            first.heads,
            inner,
            self.mm_projector[0].in_features,
        )
        shared = {k: v for k, v in self.state_dict().items() if not k.startswith("layers.")}
        for i in range(len(new.layers)):
            for key, value in self.layers[i // times].state_dict().items():
                zero = i % times and key.endswith(("o_proj.weight", "down_proj.weight"))
                shared[f"layers.{i}.{key}"] = torch.zeros_like(value) if zero else value.clone()
        new.load_state_dict(shared)
        return new
