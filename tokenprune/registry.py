"""Registries of methods and adapters: by decorator here, by entry point from other packages."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from tokenprune.errors import UnsupportedMethod
from tokenprune.family import Family
from tokenprune.method import Method
from tokenprune.towers import Towers

Factory = TypeVar("Factory", bound=Callable[..., Method])
AdapterType = TypeVar("AdapterType", bound=type)

_METHODS: dict[str, Callable[..., Method]] = {}
_FAMILIES: dict[str, Family] = {}
_BUILTIN_METHODS = (
    "baselines", "top_k", "evit", "tome", "adaptive_tome", "zero_tprune", "ats", "k_medoids",
    "dpc_knn", "pitome", "tofu", "diffrate", "saint", "algm", "pomt", "sparsevit", "adawpt",
    "at_edm", "tomesd", "todo", "toma", "region", "ras", "toca", "fopru", "visionzip", "prumerge", "divprune",
    "cdpruner", "pool", "feather", "fastv", "pyramid_drop", "ltmp",
    "ltmp_fixed", "dynamicvit", "sit", "sinkhorn", "patch_merger", "tnt", "cropr", "flip", "deferred_masking",
)  # fmt: skip
# Adapter modules by the package whose presence in the process makes them worth importing.
_BUILTIN_ADAPTERS = {
    "timm": (
        "tokenprune.adapters.timm_vit",
        "tokenprune.adapters.timm_swin",
        "tokenprune.adapters.timm_sam",
        "tokenprune.adapters.timm_hiera",
    ),
    "transformers": ("tokenprune.adapters.hf_vision", "tokenprune.adapters.hf_lvlm"),
    "diffusers": ("tokenprune.adapters.diffusers_unet", "tokenprune.adapters.diffusers_dit"),
}
_loaded: set[str] = set()


@dataclass(frozen=True)
class MethodInfo:
    """A method as `methods()` lists it. needs: what it captures; options: name -> default of its own options;
    own_budget: the one of them that is a budget, whose default is the published setting; training_only: whether it acts
    in training forwards alone."""

    name: str
    paper: str
    needs: tuple[str, ...]
    families: tuple[str, ...]
    options: dict[str, Any]
    own_budget: str
    summary: str
    training_only: bool = False


def register_method(name: str) -> Callable[[Factory], Factory]:
    """Register a factory whose keyword arguments are the options of the method called `name`.

    Raises:
        UnsupportedMethod: the name is taken.
    """

    def decorate(factory: Factory) -> Factory:
        known = _METHODS.get(name)
        if known is not None and known.__module__ != factory.__module__:
            raise UnsupportedMethod(f"a method named {name!r} is registered already, by {known.__module__}")
        _METHODS[name] = factory
        return factory

    return decorate


def register_adapter(adapter: AdapterType) -> AdapterType:
    """Register an adapter class: of image towers (see `tokenprune.host.Adapter`), or a whole family of its own
    (`tokenprune.family.Family`); those registered last are asked first."""
    made = adapter()
    _FAMILIES.pop(adapter.__name__, None)
    _FAMILIES[adapter.__name__] = Towers(made) if hasattr(made, "host") else made
    return adapter


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The recipe of a registered method.

    Raises:
        UnsupportedMethod: unknown name or option.
    """
    _load_methods()
    if not isinstance(name, str) or name not in _METHODS:
        raise UnsupportedMethod(f"unknown method {name!r}; known: {', '.join(sorted(_METHODS))}")
    # A budget of None is none given, as with those of `patch`.
    own = own_budget(name)
    options = {key: value for key, value in options.items() if key != own or value is not None}
    allowed: Mapping[str, Any] = inspect.signature(_METHODS[name]).parameters
    wrong = sorted(set(options) - set(allowed))
    if wrong:
        raise UnsupportedMethod(f"{name} has no option {wrong[0]!r}; its options: {', '.join(allowed) or 'none'}")
    for key, value in options.items():
        default = allowed[key].default
        kinds = {"bool": bool, "int": int, bool: bool, int: int}  # annotations may be strings
        if key != own and type(value) is not kinds.get(allowed[key].annotation, type(value)):
            kind = "True or False" if type(default) is bool else "a whole number"
            raise UnsupportedMethod(f"{key} of {name} is {kind}, got {value!r}; for example {key}={default!r}")
    return _METHODS[name](**options)


def own_budget(name: str) -> str:
    """The option of the registered method `name` that is a budget."""
    return _METHODS[name]().schedule.option


def method_names() -> list[str]:
    """Names of all registered methods."""
    _load_methods()
    return sorted(_METHODS)


def method_info(name: str, families: tuple[str, ...]) -> MethodInfo:
    """What `methods()` says about one method."""
    factory = _METHODS[name]
    method = factory()
    options = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
    needs = sorted(method.needs) + (["bias on the keys"] if method.proportional else [])
    needs += ["training"] if method.learned is not None else []
    summary = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
    return MethodInfo(
        name, method.paper, tuple(needs), families, options, method.schedule.option, summary, method.training_only
    )


def has_threshold(name: str) -> bool:
    """Whether there is an adaptive method `name` with a threshold, which `tokenprune.calibrate` finds."""
    return name in method_names() and _METHODS[name]().adaptive and "threshold" in method_info(name, ()).options


def families() -> list[Family]:
    """Families of the registered adapters, those registered last first; a built-in one only once its library has been
    imported."""
    import sys

    for package, modules in _BUILTIN_ADAPTERS.items():
        for module in modules:
            if package in sys.modules and module not in _loaded:
                _loaded.add(module)
                importlib.import_module(module)
    _load_entry_points("tokenprune.adapters")
    return list(reversed(_FAMILIES.values()))


def _load_methods() -> None:
    if "methods" not in _loaded:
        _loaded.add("methods")
        for module in _BUILTIN_METHODS:
            importlib.import_module(f"tokenprune.methods.{module}")
    _load_entry_points("tokenprune.methods")


def _load_entry_points(group: str) -> None:
    if group not in _loaded:
        _loaded.add(group)
        for point in entry_points(group=group):
            try:
                point.load()
            except Exception as error:  # another package's fault must not take every method with it
                warnings.warn(
                    f"the entry point {point.name} = {point.value} of {group} could not be loaded:"
                    f" {type(error).__name__}: {error}",
                    stacklevel=2,
                )
