"""The way of a patch to a vision-language model: what is refused, and the hooks on its parts."""

from __future__ import annotations

from torch import nn

from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.family import Request
from tokenprune.lvlm.encoded import ProjectorSite, TowerSite
from tokenprune.lvlm.host import LvlmHost, Scored
from tokenprune.lvlm.inside import LayerSite
from tokenprune.lvlm.patch import Describe, LvlmPatch
from tokenprune.lvlm.text import TextSite
from tokenprune.method import Method, refuse_recover


def prepare(describe: Describe, model: nn.Module, adapter: str, method: Method, request: Request) -> LvlmPatch:
    """The patch of a vision-language model; nothing is attached yet.

    Raises:
        UnsupportedMethod: the method does nothing behind a tower, or needs what this model does not have.
        BudgetError: the budget cannot be met.
    """
    host = describe(model)
    refuse_recover(method, type(host.outer).__name__)
    if request.steps is not None:
        raise UnsupportedMethod(f"steps= is for denoising runs, and {type(host.outer).__name__} has none")
    if request.restore is not None:
        raise UnsupportedMethod("restore= is of image towers, and no grid is read behind one here; leave it out")
    foreign = method.needs & {"steps", "stacks", "windows", "mixer"}
    if foreign:
        raise UnsupportedMethod(
            f"{method.name} needs {', '.join(sorted(foreign))}, which {type(host.outer).__name__} does not have;"
            " 'top_k' and others that work behind the tower take it"
        )
    if method.after_tower is None and method.inside_model is None:
        raise UnsupportedMethod(
            f"{method.name} works inside an image tower; patch(model.{_name(host.outer, host.tower)}, {method.name!r},"
            " ...) works, or a method for what comes behind it, such as 'top_k'"
        )
    if request.positions not in (None, "original", "reindex"):
        raise UnsupportedMethod(f"positions={request.positions!r}: use 'original' or 'reindex'")
    if method.inside_model is not None and (request.positions == "reindex" or host.layer is None):
        raise UnsupportedMethod(
            f"{method.name} leaves tokens out between layers, where "
            + (
                "their positions are used already; leave out positions="
                if host.layer
                else "this model's caches differ;"
            )
            + " 'top_k' and others that work behind the tower take it"
        )
    if getattr(method.schedule, "at", None) is not None or request.budget.kind == "schedule":
        raise BudgetError(
            f"{method.name} leaves tokens out once, behind the tower: there are no places to name; use keep=,"
            " tokens= or flops="
        )
    missing = method.needs - {"queries", "keys", "language model", "grid"} - host.offers
    if missing:
        raise UnsupportedMethod(
            f"{method.name} needs {' and '.join(f'a {part}' for part in sorted(missing))}, which the image tower"
            f" {type(host.tower).__name__} does not have"
        )
    patch = LvlmPatch(describe, host, adapter, method, request)
    if patch.active and patch.after and patch.after.looks_at_attention and not _scored(host, patch):
        raise UnsupportedMethod(
            f"{method.name} looks at the attention of the image tower, and that of a {type(host.tower).__name__} is not"
            " known; 'uniform' and 'divprune' work with any"
        )
    return patch


def attach(host: LvlmHost, patch: LvlmPatch) -> None:
    """Put the patch on the host's parts, innermost."""
    if patch.whole:
        patch.handle = host.outer.register_forward_pre_hook(patch.enter_outer, with_kwargs=True)
    host.model.register_forward_pre_hook(patch.enter, with_kwargs=True)
    host.model.register_forward_hook(patch.leave, always_call=True)
    if not patch.active:
        return
    site = TextSite(patch)
    host.text.register_forward_pre_hook(site.enter, with_kwargs=True)
    host.text.register_forward_hook(site.leave, prepend=True)
    scored = _scored(host, patch)
    TowerSite(patch, host, scored[-1] if scored else None).attach(host, scored)
    for index in _hooked(patch, len(host.layers)):
        assert host.layer is not None
        layer_site = LayerSite(patch, index, patch.places, host.layer(index))
        host.layers[index].register_forward_pre_hook(layer_site.enter, with_kwargs=True)
    if host.projector is not None:
        merges = host.plain and patch.after is not None and patch.after.merges
        host.projector.register_forward_pre_hook(ProjectorSite(patch, merges).enter, with_kwargs=True)
    if host.packs is not None:
        host.model.__class__ = host.packs


def _scored(host: LvlmHost, patch: LvlmPatch) -> list[Scored]:
    """The layers of the tower that are looked at, none where nothing is or can be."""
    after = patch.after
    last = host.scored(after.layer) if after is not None and after.looks_at_attention else None
    if after is None or last is None:
        return []
    if after.start_layer is None or (after.by_class_token and "class token" not in host.offers):
        return [last]
    if not 0 <= after.start_layer <= last.index:
        raise UnsupportedMethod(
            f"start_layer={after.start_layer!r}: scores are taken up to layer {last.index} of the image tower"
            f" {type(host.tower).__name__}; use start_layer=0 to {last.index}"
        )
    return [scored for layer in range(after.start_layer, last.index) if (scored := host.scored(layer))] + [last]


def _hooked(patch: LvlmPatch, depth: int) -> range:
    """Layers in front of which a hook stands: from the first that is looked at on."""
    return range(patch.places[0] + min(0, patch.inside.scored), depth) if patch.inside is not None else range(0)


def _name(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "vision_tower")
