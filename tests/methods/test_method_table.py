"""The table method x family is the one that is computed, and only the cells that are listed here are empty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import full_but

import tokenprune
from tokenprune import registry
from tokenprune.evals.family_models import IMAGE_FAMILIES, OTHER_FAMILIES
from tokenprune.evals.method_table import method_table, to_markdown
from tokenprune.method_families import shipped_table

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
FAMILIES = {family.name: family for family in (*IMAGE_FAMILIES, *OTHER_FAMILIES)}
# Those that the share of filled cells is of.
NAMED = ("timm ViT", "DeiT", "EVA (rotary)", "registers", "Swin", "Hiera", "CLIP", "SigLIP", "ViT", "DINOv2", "DINOv3")
PLAIN = tuple(name for name in [f.name for f in IMAGE_FAMILIES] if name not in ("Swin", "Swin v2", "Hiera", "SAM"))
WINDOWS = ("Swin", "Swin v2", "Hiera", "SAM")
TOWER, BEHIND, INSIDE = (family.name for family in OTHER_FAMILIES[:3])
DENOISERS = ("U-Net", "DiT", "Flux")

ADAPTIVE = ("adaptive_tome", "algm", "ats", "saint")
BIASED = ("adaptive_tome", "diffrate", "pitome", "tofu", "tome")
TOKENS = (
    *ADAPTIVE,
    *("diffrate", "dpc_knn", "evit", "k_medoids", "pitome", "pomt", "random", "tofu", "tome", "top_k", "uniform"),
    *("zero_tprune", "zero_tprune_uni"),
)
VISION = (*TOKENS, "sparsevit")
BEHIND_TOWER = ("cdpruner", "divprune", "fopru", "pool", "prumerge", "visionzip")
INSIDE_MODEL = ("fastv", "feather", "pyramid_drop")
PROMPTS = (*BEHIND_TOWER, *INSIDE_MODEL)
STEPS = ("ras", "region", "toca")
DIFFUSION = ("at_edm", "todo", "toma", "tomesd", *STEPS)
LEARNED = ("ltmp", "ltmp_fixed")
FIXED = ("cropr", "dynamicvit", "patch_merger", "sinkhorn", "sit", "tnt")
IN_FRONT = ("flip", "noise_mask")
BOTH = ("random", "top_k", "uniform", "zero_tprune", "zero_tprune_uni")

# (methods, families, what the reason says) of the cells that may be empty.
ALLOWED = (
    (PROMPTS, (*PLAIN, *WINDOWS, TOWER, *DENOISERS), "needs .*language model"),
    (DIFFUSION, (*PLAIN, *WINDOWS, TOWER, BEHIND, INSIDE), "needs .*(stacks|steps)"),
    (("sparsevit", "adawpt"), (*PLAIN, TOWER, BEHIND, INSIDE, *DENOISERS), "needs windows"),
    (BIASED, ("CaiT",), "takes no bias \\(proportional=False works\\)"),
    (
        ("adawpt", "algm", "ats", "saint"),
        ("CaiT",),
        "a different number of tokens in each image, which Cait cannot run",
    ),
    (("pomt",), ("CaiT",), "needs values, which this model does not expose"),
    (tuple(m for m in TOKENS if m not in ("random", "uniform")), ("SAM",), "windows .* hold padding"),
    (tuple(m for m in TOKENS if m not in BOTH), (BEHIND, INSIDE), "works inside an image tower"),
    ((*BOTH, *BEHIND_TOWER), (INSIDE,), "works behind the image tower"),
    (INSIDE_MODEL, (BEHIND,), "works between layers of the language model"),
    ((*ADAPTIVE, "adawpt"), DENOISERS, "a different number of tokens in each image, which no denoiser runs"),
    (("diffrate", "pitome", "tofu", "tome"), DENOISERS, "take no bias \\(proportional=False works\\)"),
    (("pomt",), DENOISERS, "needs values"),
    (("ras",), ("U-Net",), "in a U-Net no token owns a part of the prediction"),
    (("toca",), ("Flux",), "blocks whose attention and MLP are modules of their own"),
    (("todo", "toma", "tomesd"), ("Flux",), "has no part"),
    (("ltmp", *FIXED), WINDOWS, "learns for the blocks of an image tower"),
    (("ltmp",), DENOISERS, "a different number of tokens in each image, which no denoiser runs"),
    (("ltmp_fixed",), DENOISERS, "take no bias \\(proportional=False works\\)"),
    (("ltmp_fixed",), ("SAM",), "windows .* hold padding"),
    (LEARNED, ("CaiT",), "takes no bias \\(proportional=False works\\)"),
    (FIXED, DENOISERS, "learns for the blocks of an image tower, not for those of a denoiser"),
    (("dynamicvit",), ("CaiT",), "masks keys while it learns, and LayerScaleBlock takes no bias"),
    ((*LEARNED, *FIXED, *IN_FRONT), (BEHIND, INSIDE), "works inside an image tower"),
    (IN_FRONT, (*WINDOWS, *DENOISERS), "needs first_block"),
    (("deferred_masking",), (*PLAIN, *WINDOWS, TOWER, BEHIND, INSIDE, "U-Net"), "needs mixer"),
)


@pytest.fixture(autouse=True)
def only_methods_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that other tests register are in no table."""
    tokenprune.methods()
    own = {name: make for name, make in registry._METHODS.items() if make.__module__.startswith("tokenprune.methods")}
    monkeypatch.setattr(registry, "_METHODS", own)


def test_only_the_listed_cells_are_empty_and_say_why() -> None:
    table = shipped_table()
    allowed = {(m, f): why for methods, families, why in ALLOWED for m in methods for f in families}
    empty = {(m, f): why for m, row in table.cells.items() for f, why in row.items() if why}
    assert empty.keys() == allowed.keys()
    for cell, why in empty.items():
        with pytest.raises(ValueError, match=allowed[cell]):
            raise ValueError(why)
    assert list(table.adapters) == list(FAMILIES)
    assert table.filled(VISION, NAMED) > 0.9


@pytest.mark.parametrize("family", full_but(("timm ViT", "Swin", "Hiera", "CLIP", "DiT"), FAMILIES))
def test_the_table_is_the_one_that_is_computed(family: str) -> None:
    table = shipped_table()
    computed = method_table([FAMILIES[family]])
    assert {method: row[family] for method, row in table.cells.items()} == {
        method: row[family] for method, row in computed.cells.items()
    }
    assert computed.adapters[family] == table.adapters[family]
    _, target, _ = FAMILIES[family].make()
    working = set(table.works(BEHIND)) | set(table.works(INSIDE)) if "LLaVA" in family else set(table.works(family))
    if family == TOWER:
        working = set(table.works(TOWER))
    listed = tokenprune.methods(target)
    assert {info.name for info in listed} == working
    assert {info.families for info in listed} == {(table.adapters[family],)}


def test_the_documentation_has_the_table() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert to_markdown(shipped_table()) in page


def test_methods_are_listed_with_their_families() -> None:
    families = {info.name: set(info.families) for info in tokenprune.methods()}
    assert families["tome"] == {"timm_vit", "timm_swin", "timm_hiera", "hf_vision"}
    assert families["top_k"] == {
        *families["tome"],
        *("hf_lvlm", "diffusers_unet", "diffusers_dit"),
    }
    assert families["sparsevit"] == {"timm_swin", "timm_hiera", "timm_sam"}
    assert families["feather"] == {"hf_lvlm"}
    assert families["ras"] == {"diffusers_dit"}
    assert all(families.values())
