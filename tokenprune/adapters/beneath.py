"""Exchanging a block's class beneath whatever has replaced its `forward` on the instance.

Offloading (accelerate) and caches (diffusers' hooks) put a `forward` on the instance that calls the one they found; a
class exchanged later is then never called, and a native hook runs outside of theirs. So the class is exchanged, and
where the old class's method is held by such a chain, the new class's takes its place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from tokenprune.adapters.swapping import Mixin, mixed
from tokenprune.denoisers.here import here, run_here
from tokenprune.errors import UnsupportedModel


class TokenBlock(Mixin):
    """A block in front of which stands the site of a patch.

    What torch.compile compiles of it is its own forward, beneath the site: so the blocks share their graphs.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = self._compiled_call_impl or super().forward
        return run_here(self, own, args, kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        _set(self, "_compiled_call_impl", Compiled(self, partial(torch.compile, *args, **kwargs)))

    def _own(self, **arguments: Any) -> Any:
        return super().forward(**arguments)

    def _own_hooked(self, hooks: str, reduction: Any, arguments: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        # Graphs are shared among blocks, and guarded neither by their hooks nor by what is in a thread's storage: that
        # comes and goes by value.
        if hooks:
            here().reduction, here().tokens = reduction, arguments["hidden_states"].shape[1]
        return super().forward(**arguments), here().caught

    @classmethod
    def _tokenprune_exchange(cls, module: nn.Module) -> None:
        _exchange(module, cls)

    @staticmethod
    def _tokenprune_restore(module: nn.Module) -> None:
        _exchange(module, original_class(module))


class Compiled:
    """A block's own forward under torch.compile: plain, and with hooks of the site inside."""

    def __init__(self, block: TokenBlock, compiler: Callable[..., Any]) -> None:
        self.compiler = compiler
        self.plain, self.hooked = compiler(block._own), compiler(block._own_hooked)

    def __call__(self, **arguments: Any) -> Any:
        state = here()
        if not torch.compiler.is_compiling():  # several numbers of tokens are to come: one graph from the first on
            torch._dynamo.maybe_mark_dynamic(arguments["hidden_states"], 1)
            if state.reduction is not None and state.reduction.tiles is not None:
                state.reduction.tiles.compile_for_any_size()
        if not state.hooks:
            return self.plain(**arguments)
        output, state.caught = self.hooked(state.hooks, state.reduction, arguments)
        return output


def token_block(original: type[nn.Module]) -> type[nn.Module]:
    """The block class with a site in front, known to diffusers' caches as what the original is."""
    cls = mixed(TokenBlock, original)
    for method in (TokenBlock._own, TokenBlock._own_hooked):
        if method.__name__ not in vars(cls):  # torch.compile limits the graphs of a code object
            setattr(cls, method.__name__, _with_code_of_its_own(method))
    registry = TransformerBlockRegistry
    registry._register()
    if original in registry._registry:
        registry._registry[cls] = registry._registry[original]
    return cls


def _with_code_of_its_own(function: Any) -> FunctionType:
    code = function.__code__.replace(co_varnames=function.__code__.co_varnames)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def expose(module: nn.Module) -> None:
    """Put a site in front of a part of a block."""
    _exchange(module, token_block(original_class(module)))


def _exchange(module: nn.Module, cls: type[nn.Module]) -> None:
    if type(module) is cls:
        return
    compiled = getattr(module, "_compiled_call_impl", None)
    compiler = _compiler_of(compiled, module) if compiled is not None else None
    old, held = type(module).forward, list(_holders(module))
    replaced = False
    for holder, name in held:
        method = _get(holder, name)
        if isinstance(method, MethodType) and method.__self__ is module and method.__func__ is old:
            _set(holder, name, MethodType(cls.forward, module))
            replaced = True
    if "forward" in vars(module) and not replaced:
        raise UnsupportedModel(
            f"the forward of a {type(module).__name__} is replaced on the instance by something that is not known;"
            " patch the model first, then switch that on"
        )
    module.__class__ = cls
    if compiler is not None:
        again = Compiled(module, compiler) if isinstance(module, TokenBlock) else compiler(module._call_impl)
        _set(module, "_compiled_call_impl", again)


def _compiler_of(compiled: Any, module: nn.Module) -> Callable[..., Any]:
    """What compiled a module, to compile another function in the same way."""
    if isinstance(compiled, Compiled):
        return compiled.compiler
    code: Any = getattr(compiled, "__code__", None)
    names = code.co_freevars if code is not None else ()
    if "self" not in names:
        raise UnsupportedModel(
            f"a {type(module).__name__} was compiled in a way that is not known; patch the model first, then compile it"
        )
    context: Callable[..., Any] = compiled.__closure__[names.index("self")].cell_contents
    return context


def _holders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a chain of replaced forwards may hold the block's own."""
    yield vars(module), "forward"
    yield vars(module), "_old_forward"
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whether or not it has been exchanged."""
    cls: type[nn.Module] = getattr(type(module), "_tokenprune_original", type(module))
    return cls
