"""pytest plug-in for timm's own test-suite: every plain ViT that a test creates comes back patched.

Options: `--keep` (the budget; without it nothing is patched, for the baseline) and `--counts` (a JSON file to write).
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

MODULES = [
    "vision_transformer",
    "deit",
    "beit",
    "eva",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "cait",
    "naflexvit",
]
# One name for each module, block class, attention class, kind of position, pooling and number of prefix tokens.
NAMES = {
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "test_vit_relpos",
    "vit_tiny_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_rpn_224",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_base_patch32_siglip_256",
    "vit_medium_patch16_reg4_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_base_patch16_sapiens2",
    "vit_relpos_small_patch16_rpn_224",
    "vit_srelpos_small_patch16_224",
    "cait_xxs24_224",
    "naflexvit_base_patch16_gap",
    "vit_tiny_r_s16_p8_224",
}
# Tests of these modules that take no single model name.
TESTS = ("test_naflexvit_", "test_eva_", "test_relpos_", "test_hybrid_vit_", "test_radio_")

counts: Counter[str] = Counter({"created": 0, "patched": 0, "refused": 0})
refusals: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=float, default=None, help="patch every created model with this budget")
    parser.addoption("--counts", type=Path, default=None, help="write the counts to this JSON file")


def counted(init: Callable[..., None]) -> Callable[..., None]:
    """`init`, counting the models that it has made: whoever made them, each is to be patched."""

    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        counts["created"] += 1

    return wrapper


def pytest_configure(config: pytest.Config) -> None:
    keep = config.getoption("--keep")
    if keep is None:
        return
    import tokenprune
    from tokenprune.adapters.timm_vit import PLAIN_VITS

    for cls in PLAIN_VITS:
        cls.__init__ = counted(cls.__init__)
    original = timm.create_model

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> nn.Module:
        model = original(model_name, *args, **kwargs)
        if timm.models.is_model_in_modules(model_name.split(".")[0], MODULES):
            try:
                tokenprune.patch(model, keep=keep)
                counts["patched"] += 1
            except tokenprune.UnsupportedModel as error:
                counts["refused"] += 1
                refusals[model_name] = str(error).splitlines()[0]
        return model

    # The suite imports the function by name, from any of these, after plug-ins are configured.
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "timm"]:
        if getattr(module, "create_model", None) is original:
            module.create_model = create_model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wanted(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        named = call is not None and str(call.params.get("model_name")).split(".")[0] in NAMES
        downloads = item.name.startswith("test_model_inference")
        return (named or item.name.startswith(TESTS)) and not downloads

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for outcome in ("passed", "failed", "error", "skipped"):
        counts[outcome] = len(terminalreporter.stats.get(outcome, []))
    terminalreporter.write_line(
        f"tokenprune: {counts['created']} models created, {counts['patched']} patched, {counts['refused']} refused"
    )
    for name, reason in refusals.items():
        terminalreporter.write_line(f"  {name}: {reason}")
    if config.getoption("--counts"):
        config.getoption("--counts").write_text(json.dumps(counts))
