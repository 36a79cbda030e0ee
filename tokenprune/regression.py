"""Dropped tokens estimated from the kept ones: a Gaussian-process regression (Rasmussen & Williams, "Gaussian Processes
for Machine Learning", equation 2.25).

From the place at which it was dropped, a token's similarity to the kept ones is known, and from the depth at which the
grid is restored, their values. Copying the most similar token loses what lies between the kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SHARPNESS = 1.25
NOISE = 0.01
"""Kernel exp(SHARPNESS * (cosine - 1)) and the variance beside it. On a DINOv2's photographs SHARPNESS from 0.4 and
NOISE from 0.003 to 0.03 restored as well; a SHARPNESS of 4, whose estimates soon fall back to the mean, worse."""

MOST = 512
"""Most kept tokens that a regression takes, evenly chosen of more: at thousands of tokens, the squares and cubes of
their number would cost much of what dropping tokens saves."""


def stride(kept: int) -> int:
    """A regression takes every stride-th of the kept tokens, at most MOST."""
    return max(1, -(-kept // MOST))


def regression_cost(lost: int, kept: int, width: int, times: int = 1) -> float:
    """Multiply-adds of an image, whose `lost` tokens of `width` channels are regressed from `kept` ones: similarities,
    weights and, each of the `times` that the grid is restored, values."""
    taken = -(-kept // stride(kept))
    similarities = (taken + lost) * taken * (width + 4)  # behind the channels four of the place
    return similarities + taken**3 / 6 + lost * taken**2 + times * lost * taken * width


def estimate(lost: Tensor, kept: Tensor) -> Tensor:
    """Weights [B, m, k], each row summing to one, with which the values of k tokens estimate those of m others: their
    mean, and a regression of what differs from it. lost: [B, m, D], kept: [B, k, D] what similarity is measured on."""
    device = "cpu" if lost.is_meta else lost.device.type  # of the meta device there is no autocast
    with torch.autocast(device, enabled=False):
        lost, kept = (functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (lost, kept))
        across, among = (torch.exp(SHARPNESS * (x @ kept.transpose(1, 2) - 1)) for x in (lost, kept))
        noise = NOISE * torch.eye(kept.shape[1], dtype=kept.dtype, device=kept.device)
        if torch.onnx.is_in_onnx_export():
            weights = _solved_by_products(across, among + noise)
        else:
            factor = torch.linalg.cholesky_ex(among + noise)[0]  # does not raise: images of NaN stay NaN
            weights = torch.cholesky_solve(across.transpose(1, 2), factor).transpose(1, 2)
        return weights + (1 - weights.sum(2, keepdim=True)) / kept.shape[1]


def _solved_by_products(across: Tensor, among: Tensor) -> Tensor:
    """across [B, m, k] times the inverse of among [B, k, k], for ONNX, which has none: Newton's iteration (Schulz,
    1933), and one refinement. Eigenvalues are between NOISE and the largest sum of a row, at most MOST + NOISE, so that
    20 steps are enough."""
    identity = torch.eye(among.shape[1], dtype=among.dtype, device=among.device)
    inverse = identity / among.sum(2).amax(1).view(-1, 1, 1)
    for _ in range(20):
        inverse = inverse @ (2 * identity - among @ inverse)
    weights = across @ inverse
    return weights + (across - weights @ among) @ inverse
