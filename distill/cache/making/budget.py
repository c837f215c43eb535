"""Size of a cache before it is made, and the threshold for a wanted size: measured on the first samples.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from distill.cache.format import records
from distill.cache.format.manifest import Manifest
from distill.cache.format.token_order import TokenOrder
from distill.cache.making.extract import Scratch, extract
from distill.cache.making.predict import TeacherModule
from distill.errors import UserError
from distill.models.micro_batches import MicroBatches
from distill.system import units
from distill.system.units import parse_size
from distill.targets.schemes import AnyScheme, VarOpt

TOKENS = 4096
"""Tokens of the samples that are measured."""

LOWEST, HIGHEST = 0.002, 0.5
"""Bounds of the search for a threshold."""

_MARGIN = 0.95
"""Share of the fitting number of samples that is advised, since fewer samples have another order of the tokens."""


class SizeProbe:
    """The teacher's hidden states of the first samples, from which records of any scheme are made again."""

    @torch.no_grad()
    def __init__(
        self,
        module: TeacherModule,
        order: TokenOrder,
        samples: Dataset,
        count: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """Run the teacher's body over at most `count` samples, up to `TOKENS` tokens."""
        self.module, self.order = module, order
        length = len(samples[0]["input_ids"])
        chosen = Subset(samples, range(min(count, max(1, TOKENS // length))))
        self._rows: list[dict[str, Tensor]] = []
        passes = MicroBatches(module.teacher, batch_size)
        for batch in DataLoader(chosen, batch_size=batch_size):
            hidden_BLD = passes.hidden_states(batch["input_ids"].to(device), batch["position_ids"].to(device))
            columns = {"hidden": hidden_BLD, **batch}
            self._rows += [{name: column[row] for name, column in columns.items()} for row in range(len(hidden_BLD))]
        self.tokens = length * len(self._rows)

    def bytes_per_token(self, scheme: AnyScheme) -> float:
        """Return the size of the samples' records under a scheme, divided by their tokens."""
        module, head = self.module, self.module.teacher.head.with_rows(self.module.vocab_size)
        size, scratch = 0, Scratch()
        for row in self._rows:
            ids_L, positions_L, mask_L = row["input_ids"], row["position_ids"], row["loss_mask"]
            device = row["hidden"].device
            record = extract(
                row["hidden"],
                head,
                ids_L.to(device),
                positions_L.to(device),
                mask_L.to(device),
                scheme,
                seed=module.seed,
                temperature=module.temperature,
                chunk_size=module.chunk_size,
                scratch=scratch,
            )
            size += len(records.encode(self.order.ranked(record), scheme))
        return size / self.tokens

    def threshold_for(self, bytes_per_token: float, scheme: VarOpt) -> VarOpt:
        """Return the scheme with the threshold, to three digits, at which the samples take at most about so much.

        Raises UserError if no threshold from 0.002 to 0.5 does.
        """
        at = {bound: self.bytes_per_token(replace(scheme, threshold=bound)) for bound in (LOWEST, HIGHEST)}
        if not at[HIGHEST] <= bytes_per_token <= at[LOWEST]:
            raise UserError(
                f"cache.bytes_per_token: {bytes_per_token:g} cannot be had for this teacher and corpus: "
                f"thresholds from {HIGHEST} to {LOWEST} take {at[HIGHEST]:.1f} to {at[LOWEST]:.1f} bytes"
            )
        low, high = LOWEST, HIGHEST
        for _ in range(8):  # a factor of 250 between the bounds: the last interval is 2 % wide
            middle = float(f"{math.sqrt(low * high):.3g}")
            if self.bytes_per_token(replace(scheme, threshold=middle)) > bytes_per_token:
                low = middle
            else:
                high = middle
        return replace(scheme, threshold=high)

    def check_size(self, scheme: AnyScheme, manifest: Manifest, max_size: str) -> float:
        """Return bytes a token. Raises UserError if the forecast is over `max_size`, with a remedy."""
        size, limit = self.bytes_per_token(scheme), parse_size(max_size, "cache.max_size")
        tokens = manifest.samples * manifest.sequence_length
        if size * tokens <= limit:
            return size
        advice = [f"raise it to {math.ceil(size * tokens / 1e5) / 10:.1f}MB"]
        if isinstance(scheme, VarOpt):
            # The number is rounded down so that it fits. It is not advised if no threshold makes records so small.
            affordable = math.floor(10 * limit / tokens) / 10
            if affordable >= self.bytes_per_token(replace(scheme, threshold=HIGHEST)):
                advice.append(f"give --cache.bytes_per_token {affordable:.1f}")
        held_out = manifest.splits["held_out"]
        fits = int(_MARGIN * limit / (size * manifest.sequence_length)) - held_out
        if fits > 0:
            advice.append(f"give --cache.max_samples {fits}")
        raise UserError(
            f"cache.max_size: the forecast is {units.size(size * tokens)} ({size:.1f} bytes for each of "
            f"{tokens:,} tokens), over {max_size}: {', or '.join(advice)}"
        )
