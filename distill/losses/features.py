"""Distance of the student's final hidden states to the teacher's: feature matching without attention maps.

Shapes: N positions, D the teacher's hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from distill.errors import UserError


def feature_distance(student_ND: Tensor, teacher_ND: Tensor, kind: Literal["cosine", "mse"]) -> Tensor:
    """Return `[N]` distances in float32 (float64 for float64 states). The gradient flows into the student alone.

    cosine: `1 − cos(student, teacher)`, 0 to 2 for any lengths (Sanh et al. 2019, "DistilBERT"). mse: mean over D of
    the squared difference (Jiao et al. 2020, "TinyBERT"). The caller projects a student of another size to the
    teacher's, with a learned linear map as in TinyBERT.
    """
    assert student_ND.shape == teacher_ND.shape, (student_ND.shape, teacher_ND.shape)
    wide = torch.float64 if student_ND.dtype == torch.float64 else torch.float32
    student_ND, teacher_ND = student_ND.to(wide), teacher_ND.detach().to(wide)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student_ND, teacher_ND, dim=-1)
    return (student_ND - teacher_ND).square().mean(dim=-1)


def check_features(weight: float, scheme: str) -> None:
    """Raise UserError if features are to be matched (`weight` above 0) and a scheme's targets have none."""
    if weight < 0:
        raise UserError(f"loss.feature_weight: {weight:g}: must not be negative; 0 turns it off")
    if weight and scheme != "hidden":
        raise UserError(
            f"loss.feature_weight: {scheme} targets have no hidden states of the teacher's: "
            "cache with --cache.scheme hidden, or leave it at 0"
        )
