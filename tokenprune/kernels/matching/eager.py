"""Cosine matching in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Best match of each row of a among the rows of b by cosine similarity, ties to the lower row.

    a: [B, M, D], b: [B, N, D]. Returns the similarity [B, M] and the row [B, M]. Used by ToMe (Bolya et al., 2023,
    section 3), Zero-TPrune's similarity stage and similarity-based recovery.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)  # half precision rounds the smallest length to zero
    a, b = a.to(dtype), b.to(dtype)
    similarity = torch.bmm(F.normalize(a, dim=-1), F.normalize(b, dim=-1).transpose(1, 2))
    value, row = similarity.max(dim=-1)
    return value, row
