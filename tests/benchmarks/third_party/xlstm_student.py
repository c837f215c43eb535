"""A student of xlstm: blocks of mLSTM."""

from torch import nn
from xlstm import mLSTMBlockConfig, xLSTMLMModel, xLSTMLMModelConfig

from distill.models.language_model import Head


class XLSTM(nn.Module):
    def __init__(self, vocab_size: int, sequence_length: int, width: int = 256, layers: int = 6):
        super().__init__()
        config = xLSTMLMModelConfig(
            mlstm_block=mLSTMBlockConfig(),
            context_length=sequence_length,
            num_blocks=layers,
            embedding_dim=width,
            vocab_size=vocab_size,
        )
        self.lm = xLSTMLMModel(config)
        self.lm.reset_parameters()

    def body(self, ids, positions):
        return self.lm.xlstm_block_stack(self.lm.token_embedding(ids))

    @property
    def head(self):
        return Head(self.lm.lm_head.weight)
