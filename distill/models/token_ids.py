"""Token numbers in a model's configuration, in the form that its family takes."""

from __future__ import annotations

from typing import Any

NO_TOKEN = -1
"""The number that stands for no token in a configuration that takes no None."""


def set_token_id(config: Any, name: str, value: int | list[int] | None) -> None:
    """Set a token number, or several. A family that takes one number gets the first, or `NO_TOKEN` for None.

    `generate` and our own commands read the generation settings beside the configuration, which hold all of them.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        setattr(config, name, value)
    except StrictDataclassError:
        first = value[0] if isinstance(value, list) else value
        setattr(config, name, NO_TOKEN if first is None else first)
