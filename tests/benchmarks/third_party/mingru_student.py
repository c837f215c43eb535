"""A student of minGRU-pytorch: a recurrent network that is trained in parallel."""

from minGRU_pytorch.minLM import minLM
from torch import nn

from distill.models.language_model import Head


class MinGRU(nn.Module):
    def __init__(self, vocab_size: int, width: int = 256, layers: int = 6):
        super().__init__()
        self.lm = minLM(num_tokens=vocab_size, dim=width, depth=layers)
        self.output, self.lm.to_logits = self.lm.to_logits, nn.Identity()

    def body(self, ids, positions):
        return self.lm(ids)

    @property
    def head(self):
        return Head(self.output.weight)
