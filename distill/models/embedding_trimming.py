"""A `transformers` model cut down to some of its tokens: embedding, head, and the token numbers in its configuration.

Shapes: L tokens of a row, K kept tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.token_ids import set_token_id


@torch.no_grad()
def keep_tokens(model: Any, logits: Callable[[Tensor], Tensor], kept_ids: Tensor, compares: bool) -> None:
    """Cut a model down to the tokens `kept_ids` (rising), in place.

    With `compares`, the `logits` `[L, V]` of a few kept tokens are taken before and after. Raises ValueError when they
    differ: the family has tables of its tokens that were not cut.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    rows = min(len(embedding.weight), len(output.weight))
    if not len(kept_ids) or int(kept_ids[-1]) >= rows:
        raise ValueError(f"the model has {rows} tokens, and is to keep token {kept_ids[-1:].tolist()}")
    new_L = torch.arange(8, device=embedding.weight.device) * 7 % len(kept_ids)
    before_LK = logits(kept_ids.to(new_L.device)[new_L])[:, kept_ids.to(new_L.device)] if compares else None
    to_new = {old: new for new, old in enumerate(kept_ids.tolist())}
    padding = getattr(embedding, "padding_idx", None)
    weights = {id(weight): weight for weight in (embedding.weight, output.weight, getattr(output, "bias", None))}
    for weight in weights.values():  # a tied weight once
        if weight is not None:
            weight[: len(kept_ids)] = weight[kept_ids.to(weight.device)]
    for table in _tables_of_layers(model):  # tokens beyond it use its first row
        inside = torch.where(kept_ids < len(table.weight), kept_ids, 0).to(table.weight.device)
        table.weight = nn.Parameter(table.weight[inside], table.weight.requires_grad)
        table.num_embeddings = len(kept_ids)
    model.resize_token_embeddings(len(kept_ids))
    model.get_input_embeddings().padding_idx = to_new.get(padding)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        _renumber_tokens(config, to_new)
    if model.generation_config is not None:
        _renumber_tokens(model.generation_config, to_new)
    if before_LK is not None and not _agree(logits, new_L, before_LK):
        raise ValueError(
            f"{type(model).__name__} cannot be cut down to some of its tokens: it has more tables of them than "
            "embedding and head, and would answer otherwise; leave --student.vocabulary full"
        )


def _tables_of_layers(model: Any) -> Iterator[nn.Embedding]:
    """Yield Gemma's second tables of tokens, which hold a vector a layer."""
    for module in model.modules():
        table = getattr(module, "embed_tokens_per_layer", None)
        if isinstance(table, nn.Embedding):
            yield table


def _agree(logits: Callable[[Tensor], Tensor], new_L: Tensor, before_LK: Tensor) -> bool:
    try:
        error = torch.linalg.vector_norm(logits(new_L) - before_LK) / torch.linalg.vector_norm(before_LK)
    except (RuntimeError, IndexError, ValueError):
        return False
    return bool(error <= 1e-3)


def _renumber_tokens(config: Any, to_new: dict[int, int]) -> None:
    """Write every `…_token_id` of a configuration (one token, or several) under its new number; None if it is gone."""
    for name, value in config.to_dict().items():
        if name.endswith("_token_id"):
            if isinstance(value, list):
                set_token_id(config, name, [to_new[old] for old in value if old in to_new] or None)
            elif value is not None:
                set_token_id(config, name, to_new.get(value))
