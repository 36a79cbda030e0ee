"""What kind of model a name on the command line is, and which commands take such a one."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.errors import UnsupportedModel

ALL = frozenset(
    ("methods", "report", "bench", "eval", "compare", "viz", "patterns", "search", "calibrate", "train", "score")
)
"""Commands that name a model."""


@dataclass(frozen=True)
class Kind:
    """does: what such a model does. commands: that take one. instead: what answers the question of those that do not,
    where there is something."""

    does: str
    commands: frozenset[str]
    instead: str

    def refusal(self, name: str, command: str) -> str:
        """Why `command` does not take the model called `name`, and what does."""
        taken = f"; it is for tokenprune {', '.join(sorted(self.commands))}" if self.commands else ""
        return f"{command} is not for {name}, which {self.does}{taken}; {self.instead.format(name=name)}"


IMAGES = Kind("takes images", ALL, "")
_DRAWS = Kind(
    "draws pictures",
    frozenset(("methods", "report", "bench", "eval", "compare")),
    "tokenprune demo-diffusion draws its pictures beside the unpatched ones, and its schedule= is named by hand",
)
_ANSWERS = Kind(
    "answers questions about pictures",
    frozenset(("methods", "report", "eval", "compare")),
    "tokenprune eval --model {name} --rounds 20 times it too, and its budget is keep=",
)
_RESTORES = Kind(
    "restores pictures and has no classes",
    frozenset(("methods", "report", "bench", "viz")),
    "python -m tokenprune.evals.deblur_quality measures its PSNR, patched and unpatched",
)
_READS = Kind(
    "is the convolutional judge of drawn digits and has no tokens",
    frozenset(),
    "tokenprune train {name} --output FOLDER trains it anew, and eval of dit-digits and unet-digits asks it",
)
_OF_HUB = frozenset(("methods", "report", "eval"))
_CLIP = Kind("puts images and texts into one space", _OF_HUB, "for the others name a tower of timm")
_VLM = Kind("answers questions about images", _OF_HUB, "tokenprune eval --data questions.jsonl measures its answers")
_PIPE = Kind("draws pictures for prompts", _OF_HUB, "tokenprune eval --data prompts.txt measures its pictures")

KINDS = {
    "dit-digits": _DRAWS,
    "unet-digits": _DRAWS,
    "lvlm-digits": _ANSWERS,
    "deblur-swin": _RESTORES,
    "digit-reader": _READS,
}
PREFIXES = {"clip:": _CLIP, "vlm:": _VLM, "pipe:": _PIPE}


def kind_of(name: str) -> Kind:
    """The kind of the model called `name`; of one that is not known, that it takes images."""
    prefixed = (kind for prefix, kind in PREFIXES.items() if name.startswith(prefix))
    return KINDS.get(name) or next(prefixed, IMAGES)


def refuse_kind(name: str, command: str) -> None:
    """Raises UnsupportedModel, with what is for such a model, where `command` does not take it."""
    kind = kind_of(name)
    if command.split()[0] not in kind.commands:
        raise UnsupportedModel(kind.refusal(name, command))
