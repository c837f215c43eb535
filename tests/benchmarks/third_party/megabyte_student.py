"""A student of MEGABYTE-pytorch: patches of four tokens, and a small model within each."""

from MEGABYTE_pytorch import MEGABYTE
from torch import nn

from distill.models.language_model import Head


class Megabyte(nn.Module):
    def __init__(self, vocab_size: int, sequence_length: int, width: int = 256, layers: int = 3):
        super().__init__()
        self.model = MEGABYTE(
            num_tokens=vocab_size,
            dim=(width, width // 2),
            depth=(layers, layers),
            max_seq_len=(-(-sequence_length // 4), 4),
            dim_head=width // 4,
            heads=4,
            rel_pos=True,
        )
        self.output, self.model.to_logits = self.model.to_logits, nn.Identity()

    def body(self, ids, positions):
        return self.model(ids)

    @property
    def head(self):
        return Head(self.output.weight, self.output.bias)
