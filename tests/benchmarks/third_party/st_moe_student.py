"""A student of st-moe-pytorch: torch's attention, and a mixture of experts whose balance is an auxiliary loss."""

from st_moe_pytorch import MoE, SparseMoEBlock
from torch import nn

from distill.models.language_model import Head


class STMoE(nn.Module):
    def __init__(self, vocab_size: int, width: int = 256, layers: int = 4, heads: int = 4, experts: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers))
        moe = [MoE(dim=width, num_experts=experts, gating_top_n=2) for _ in range(layers)]
        self.mixtures = nn.ModuleList(SparseMoEBlock(each) for each in moe)
        self.norm, self.heads = nn.RMSNorm(width), heads

    def body(self, ids, positions):
        document = nn.functional.pad((positions.diff() != 1).cumsum(1), (1, 0))
        hidden = ~(document[:, :, None] == document[:, None, :]).tril()
        mask, x, balance = hidden.repeat_interleave(self.heads, 0), self.tokens(ids), 0.0
        for attention, mixture in zip(self.attention, self.mixtures, strict=True):
            x = x + attention(x, x, x, attn_mask=mask, need_weights=False)[0]
            x, loss, *_ = mixture(x)
            balance = balance + loss.sum() * ids.numel()
        return self.norm(x), balance

    @property
    def head(self):
        return Head(self.tokens.weight)
