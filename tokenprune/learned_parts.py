"""Learned parts as files: safetensors, and JSON that says what they are of. Nothing else is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.errors import MALFORMED, BudgetError, TokenPruneError, UntrainedMethod

VERSION = 1
NAME = "learned"
SUFFIX = ".safetensors"
LIKE = 1e-3
"""How much the norms of a model's blocks may differ, relatively, from those of the one that shipped parts are of: a
cast to bfloat16 changes them by less, a training by more."""


class LearningBlock(Protocol):
    """A block of `Learner`. width: channels of its tokens."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def width(self) -> int: ...


class Learner(Protocol):
    """What learned parts are of."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def blocks(self) -> Sequence[LearningBlock]: ...
    @property
    def num_prefix_tokens(self) -> int: ...


@dataclass(frozen=True)
class LearnedParts:
    """What a method has learned for a model.

    tensors: by name, of the parts of all places. options: of the method. architecture: of the model, see the function
    of that name. norms: of its blocks' weights. found: how they were trained; "flops" is the budget.

    `tokenprune.patch(model, method, weights=...)` takes one, the folder or file that `save` writes, or the name of a
    shipped one.
    """

    method: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    architecture: Mapping[str, Any]
    norms: tuple[float, ...]
    found: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write them to `path`, a folder or a file ending in .safetensors, with their JSON beside it; returns the
        file. Each is written in one piece.

        Raises:
            TokenPruneError: `path` is a file of another name, which would be overwritten.
        """
        file = _file(Path(path))
        if file.suffix != SUFFIX:
            raise TokenPruneError(f"{file} is a file that is there already; name a folder, or a {SUFFIX} file")
        file.parent.mkdir(parents=True, exist_ok=True)
        content = safetensors().torch.save({name: tensor.contiguous() for name, tensor in self.tensors.items()})
        write_whole(file, content)
        write_whole(file.with_suffix(".json"), self.record(sha256=hashlib.sha256(content).hexdigest()))
        return file

    def record(self, **of_file: str) -> bytes:
        """All but the tensors as JSON, with what there is to say of the file beside it."""
        data = {
            "version": VERSION,
            "method": self.method,
            "options": dict(self.options),
            "architecture": dict(self.architecture),
            "norms": list(self.norms),
            **of_file,
            "found": dict(self.found),
        }
        return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def load_learned(source: str | PathLike[str] | LearnedParts) -> LearnedParts:
    """The learned parts in the folder or file `source`, or the shipped ones of that name.

    Raises:
        TokenPruneError: there are none, they are cut off or changed, or not safetensors.
    """
    if isinstance(source, LearnedParts):
        return source
    if not isinstance(source, (str, PathLike)):
        raise TokenPruneError(
            f"weights={source!r}: name the folder of tokenprune train, a .safetensors file in it, or a shipped one:"
            f" {', '.join(shipped_parts()) or 'none'}"
        )
    if str(source) in shipped_parts():
        file: Any = _folder() / f"{source}{SUFFIX}"
        return _read(file, _folder() / f"{source}.json")
    file = _file(Path(source))
    require_safetensors(file)
    if not file.with_suffix(".json").is_file():
        raise TokenPruneError(f"{file} is without {file.with_suffix('.json').name}, which says what it is of")
    return _read(file, file.with_suffix(".json"))


def _read(file: Any, described: Any) -> LearnedParts:
    content = file.read_bytes()
    try:
        data = json.loads(described.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise TokenPruneError(f"{described} has version {data['version']!r}; this release reads version {VERSION}")
        digest, norms = data["sha256"], tuple(map(float, data["norms"]))
        rest = data["method"], dict(data["options"]), dict(data["architecture"]), dict(data["found"])
    except TokenPruneError:
        raise
    except MALFORMED as error:
        raise TokenPruneError(f"{described} is none that tokenprune train has written: {error!r}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise TokenPruneError(
            f"{file} is cut off, changed, or of another training than {described.name}; copy both files again"
        )
    return LearnedParts(rest[0], rest[1], safetensors().torch.load(content), rest[2], norms, rest[3])


def _file(path: Path) -> Path:
    return path if path.suffix == SUFFIX or path.is_file() else path / f"{NAME}{SUFFIX}"


def require_safetensors(path: Path) -> None:
    """Raises TokenPruneError for a file that is not there or no safetensors."""
    if not path.is_file():
        raise TokenPruneError(f"there is no checkpoint {path}")
    if path.suffix != SUFFIX:
        raise TokenPruneError(
            f"{path} is refused: only .safetensors are read, a pickle can run any code. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    library = safetensors()
    try:
        with library.safe_open(path, framework="pt"):
            pass
    except library.SafetensorError as error:
        raise TokenPruneError(f"{path} is no safetensors file, whatever its name: {error}") from error


def safetensors() -> Any:
    """The library, with its functions for torch.

    Raises:
        TokenPruneError: it is not installed.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise TokenPruneError("learned parts are safetensors: pip install 'tokenprune-torch[train]'") from error
    return safetensors


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one piece: a kill while writing leaves the one before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    replace(partial, path)


def architecture(host: Learner, adapter: str) -> dict[str, Any]:
    """What learned parts are bound to: family, blocks, channels and prefix tokens."""
    return {
        "family": adapter,
        "blocks": len(host.blocks),
        "width": host.blocks[0].width,
        "prefix_tokens": host.num_prefix_tokens,
    }


def block_norms(host: Learner) -> tuple[float, ...]:
    """Of each block the norm of all its weights."""
    norms = []
    for block in host.blocks:
        squares = [p.detach().float().square().sum() for p in block.module.parameters() if p.is_floating_point()]
        norms.append(float(torch.stack(squares).sum().sqrt()) if squares and not squares[0].is_meta else 0.0)
    return tuple(norms)


def chosen_parts(host: Learner, adapter: str, method: str, flops: float | None, weights: object) -> LearnedParts:
    """Those that `weights` names, or the shipped ones of this very model at the budget `flops`.

    Raises:
        UntrainedMethod: none are shipped. BudgetError: those named are for another budget.
        TokenPruneError: they are of another method or architecture.
    """
    if weights is None:
        return shipped_for(host, adapter, method, flops)
    parts = load_learned(weights)  # type: ignore[arg-type]
    own = architecture(host, adapter)
    if parts.method != method:
        raise TokenPruneError(f"the learned parts are of {parts.method}; patch(model, {parts.method!r}, weights=...)")
    if parts.architecture != own:
        differs = [f"{key} {parts.architecture.get(key)!r}, not {value!r}" for key, value in own.items()]
        differs = [text for text, key in zip(differs, own, strict=True) if parts.architecture.get(key) != own[key]]
        raise TokenPruneError(
            f"the learned parts are of another architecture than {type(host.model).__name__}: {'; '.join(differs)}."
            f" Train its own: tokenprune train MODEL --method {method} --flops 0.6 --output FOLDER"
        )
    trained = parts.found.get("flops")
    if flops is not None and trained is not None and abs(trained - flops) > 1e-9:
        raise BudgetError(
            f"flops={flops:g} is not what these parts were trained for: flops={trained:g}, which patch(model,"
            f" {method!r}, flops={trained:g}, weights=...) takes; another budget needs a training of its own"
        )
    return parts


def shipped_for(host: Learner, adapter: str, method: str, flops: float | None) -> LearnedParts:
    """The shipped ones of this very model and its classifier, at the budget `flops` or any.

    Raises:
        UntrainedMethod: there are none.
    """
    own, norms = architecture(host, adapter), torch.tensor(block_norms(host))
    budgets = []
    for name in shipped_parts():
        parts = load_learned(name)
        if parts.method != method or parts.architecture != own or parts.found.get("labels") == "maps":
            continue  # those of maps are of another task of the same tower, and are named
        if not torch.allclose(torch.tensor(parts.norms), norms, rtol=LIKE, atol=0):
            continue
        if flops is None or abs(parts.found["flops"] - flops) < 1e-9:
            return parts
        budgets.append(parts.found["flops"])
    share = 0.6 if flops is None else flops
    known = f"for this model there is flops={', '.join(f'{b:g}' for b in budgets)}; " if budgets else ""
    raise UntrainedMethod(
        f"{method} has to learn for this model first: {known}tokenprune train MODEL --method {method} --data FOLDER"
        f" --flops {share:g} --output LEARNED, then patch(model, {method!r}, weights='LEARNED')"
    )


def shipped_parts() -> tuple[str, ...]:
    """Names of the learned parts in the package: model, method and share of the multiply-adds."""
    names = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)))


def _folder() -> Any:
    return resources.files("tokenprune") / "weights"
