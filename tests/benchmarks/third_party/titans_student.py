"""A student of titans-pytorch: attention over segments, beside a memory that learns while it reads."""

from titans_pytorch import MemoryAsContextTransformer
from torch import nn

from distill.models.language_model import Head


class Titans(nn.Module):
    def __init__(self, vocab_size: int, width: int = 256, layers: int = 4, segment: int = 16):
        super().__init__()
        self.model = MemoryAsContextTransformer(
            num_tokens=vocab_size, dim=width, depth=layers, segment_len=segment, heads=4, dim_head=width // 4
        )
        self.output, self.model.to_logits = self.model.to_logits, nn.Identity()

    def body(self, ids, positions):
        return self.model(ids)

    @property
    def head(self):
        return Head(self.output.weight)
