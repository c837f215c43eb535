"""A student of rwkv-simple: RWKV 6 in plain PyTorch."""

from rwkv_simple import RWKV
from torch import nn

from distill.models.language_model import Head


class Rwkv(nn.Module):
    def __init__(self, vocab_size: int, width: int = 256, layers: int = 6):
        super().__init__()
        self.rwkv = RWKV(d_model=width, d_head=32, n_layer=layers, vocab_size=vocab_size)

    def body(self, ids, positions):
        return self.rwkv(ids, need_state=False, need_x_unemb=False)

    @property
    def head(self):
        return Head(self.rwkv.head.weight)
