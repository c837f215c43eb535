"""A small decoder in plain PyTorch: the worked example of a student plug-in. Copy it, change it, name your copy.

A student is a module with two members: `body` turns token ids into hidden states, and `head` says how hidden states
become logits. The loss walks the head in chunks, so the module itself never makes logits. Its options are the arguments
of its `__init__`; the pipeline fills in `vocab_size`, which it knows from the tokenizer.

Shapes: B batch, L sequence length, D hidden size, H heads, G key-value heads, E size of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from distill.models.language_model import Head


class CompactDecoder(nn.Module):
    """Pre-norm transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU; the architecture of Llama."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 384,
        layers: int = 8,
        heads: int = 6,
        key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        rope_theta: float = 10_000.0,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        """Build the model; by default with half as many key-value heads as heads (all, if odd).

        The default MLP has 8/3 of the hidden size.
        """
        super().__init__()
        if key_value_heads is None:
            key_value_heads = heads // 2 if heads % 2 == 0 else heads
        if intermediate_size is None:
            intermediate_size = math.ceil(hidden_size * 8 / 3 / 64) * 64  # multiples of 64 suit tensor cores
        _check_sizes(vocab_size, hidden_size, layers, heads, key_value_heads, intermediate_size)
        self.head_size = hidden_size // heads
        self.rope_theta = rope_theta
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        # Activation checkpointing and sharding look for the blocks in a ModuleList, so keep them in one.
        self.blocks = nn.ModuleList(
            Block(hidden_size, heads, key_value_heads, intermediate_size, norm_eps) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.output = nn.Linear(hidden_size, vocab_size, bias=False)
        self._initialise()
        if tie_embeddings:  # one matrix for input and output: much of a small model's parameters
            self.output.weight = self.embedding.weight

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Return the hidden states `[B, L, D]`. Packed documents, whose positions restart, do not see one another."""
        hidden_BLD = self.embedding(input_ids_BL)
        rotation = rotary_angles(position_ids_BL, self.head_size, self.rope_theta)  # once for all blocks
        mask = document_mask(position_ids_BL)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, rotation, mask)
        return self.norm(hidden_BLD)

    @property
    def head(self) -> Head:
        """The head, a property so that it always holds the current parameter (sharding and casting replace it)."""
        return Head(self.output.weight)

    def _initialise(self) -> None:
        """Draw normal weights, smaller ones for the matrices that write to the residual stream.

        So its variance does not grow with the number of blocks (GPT-2, §2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention_output.weight", "mlp_output.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)


class Block(nn.Module):
    """Attention, then MLP. Each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, hidden_size: int, heads: int, key_value_heads: int, intermediate_size: int, eps: float) -> None:
        super().__init__()
        self.head_size = hidden_size // heads
        self.sharing = heads // key_value_heads  # heads that share one key and value
        self.attention_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.query = nn.Linear(hidden_size, heads * self.head_size, bias=False)
        self.key = nn.Linear(hidden_size, key_value_heads * self.head_size, bias=False)
        self.value = nn.Linear(hidden_size, key_value_heads * self.head_size, bias=False)
        self.attention_output = nn.Linear(heads * self.head_size, hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.mlp_output = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        hidden_BLD = hidden_BLD + self._attention(self.attention_norm(hidden_BLD), rotation, mask)
        normed_BLD = self.mlp_norm(hidden_BLD)
        return hidden_BLD + self.mlp_output(silu(self.gate(normed_BLD)) * self.up(normed_BLD))

    def _attention(self, normed_BLD: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        query_BHLE = rotate(self._split(self.query(normed_BLD)), rotation)
        key_BGLE = rotate(self._split(self.key(normed_BLD)), rotation)
        value_BGLE = self._split(self.value(normed_BLD))
        # Keys and values are repeated by hand: with `enable_gqa` and a mask, CUDA falls back to the kernel that makes
        # all L x L scores.
        mixed_BHLE = scaled_dot_product_attention(
            query_BHLE,
            key_BGLE.repeat_interleave(self.sharing, dim=1),
            value_BGLE.repeat_interleave(self.sharing, dim=1),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.attention_output(mixed_BHLE.transpose(1, 2).flatten(2))

    def _split(self, projected: Tensor) -> Tensor:
        """Split `[B, L, heads * E]` into `[B, heads, L, E]`."""
        return projected.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def document_mask(position_ids_BL: Tensor) -> Tensor | None:
    """Return the keys that each query may see, `[B, 1, L, L]`: earlier ones of its document. None means plainly causal.

    A document begins wherever the position is not the one before plus one. One document a row needs no mask, and
    without one the attention kernel skips half of the work.
    """
    begins_BL = position_ids_BL.diff(dim=-1) != 1
    if not bool(begins_BL.any()):
        return None
    document_BL = nn.functional.pad(begins_BL.cumsum(dim=-1), (1, 0))
    same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    return same_BLL.tril()[:, None]


def rotary_angles(position_ids_BL: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[B, 1, L, E]` of rotary positions (Su et al. 2021), in float32.

    16 bits would blur far positions.
    """
    exponents = torch.arange(0, head_size, 2, device=position_ids_BL.device).float() / head_size
    angles_BLE = position_ids_BL[..., None].float() * theta**-exponents
    angles_BLE = torch.cat([angles_BLE, angles_BLE], dim=-1)[:, None]
    return angles_BLE.cos(), angles_BLE.sin()


def rotate(heads_BHLE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (e, e + E/2) of a head by its position's angle."""
    cosine, sine = rotation
    first, second = heads_BHLE.chunk(2, dim=-1)
    turned = heads_BHLE * cosine + torch.cat([-second, first], dim=-1) * sine
    return turned.to(heads_BHLE.dtype)


def _check_sizes(
    vocab_size: int, hidden_size: int, layers: int, heads: int, key_value_heads: int, intermediate_size: int
) -> None:
    """Raise ValueError for sizes that do not fit. It becomes one short message to the user."""
    if min(vocab_size, hidden_size, layers, heads, key_value_heads, intermediate_size) < 1:
        raise ValueError("vocab_size, hidden_size, layers, heads, key_value_heads, intermediate_size: at least 1 each")
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise ValueError(f"hidden_size {hidden_size} does not split into {heads} heads of even size")
    if heads % key_value_heads:
        raise ValueError(f"heads {heads} is not a multiple of key_value_heads {key_value_heads}")
