"""bitsandbytes' paged 8-bit AdamW, whose moments are still paged after a checkpoint was loaded."""

from __future__ import annotations

from typing import Any

import bitsandbytes


class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):
    """An optimiser whose moments lie in memory that the driver moves to the host when the card is full."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load the state into paged memory. bitsandbytes would leave the moments on the card for good."""
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, state in self.state.items():
            for key in ("state1", "state2"):
                if key in state:
                    paged = self.get_state_buffer(parameter, dtype=state[key].dtype)
                    state[key] = paged.copy_(state[key])
        self.initialized = False  # so that the next step moves the rest to the card
