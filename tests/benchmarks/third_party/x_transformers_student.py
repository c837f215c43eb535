"""A student of x-transformers: its decoder with rotary positions, and a mask that keeps packed documents apart."""

from torch import nn
from x_transformers import Decoder, TransformerWrapper

from distill.models.language_model import Head


class XTransformer(nn.Module):
    def __init__(self, vocab_size: int, sequence_length: int, width: int = 256, layers: int = 6, heads: int = 4):
        super().__init__()
        decoder = Decoder(dim=width, depth=layers, heads=heads, rotary_pos_emb=True, use_rmsnorm=True)
        self.model = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=sequence_length, use_abs_pos_emb=False, attn_layers=decoder
        )

    def body(self, ids, positions):
        document = nn.functional.pad((positions.diff() != 1).cumsum(1), (1, 0))
        mask = (document[:, :, None] == document[:, None, :])[:, None]
        return self.model(ids, return_embeddings=True, pos=positions, attn_mask=mask)

    @property
    def head(self):
        return Head(self.model.to_logits.weight)
