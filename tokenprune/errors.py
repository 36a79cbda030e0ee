"""The errors that the library raises on purpose: each names what was asked, what is possible and a call that works."""


class TokenPruneError(ValueError):
    """Base class of every error raised on purpose by tokenprune."""


class UnsupportedModel(TokenPruneError):
    """The target has a part that no adapter recognises; patching it would be a guess."""


class UnsupportedMethod(TokenPruneError):
    """The method is unknown, or cannot work on this target."""


class UntrainedMethod(UnsupportedMethod):
    """The method works on this target once it has been trained for it."""


class BudgetError(TokenPruneError):
    """The budget is malformed, or this method cannot meet it on this target."""


class SlowdownError(TokenPruneError):
    """A speed-up was required, and the latency table of this device predicts none or does not exist."""


def unknown_module(module: object) -> UnsupportedModel:
    """The refusal of a part that no adapter knows."""
    return UnsupportedModel(
        f"{type(module).__module__}.{type(module).__qualname__} is not known, and guessing what it indexes by token"
        " would be silently wrong; register an adapter for it with tokenprune.register_adapter"
    )


MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What JSON raises, parsed and looked into, that is not as this library writes it: no JSON, other keys and types,
numbers that no float holds, thousands of brackets. TokenPruneError is a ValueError: let it pass first."""
