"""Every block of Python on a page runs, in the page's order; a call in the middle of a sentence could be made."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch
from documented import GIVEN, INSTEAD
from documents import PAGES, blocks, calls

import tokenprune

METHODS = {method.name for method in tokenprune.methods()}


@pytest.mark.usefixtures("folder", "small", "once")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_runs(page: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(GIVEN.get(page, ""), names)
    unused = set(INSTEAD.get(page, ()))
    for block in blocks(page):
        code = block.code
        for words, others in INSTEAD.get(page, {}).items():
            unused -= {words} if words in code else set()
            code = code.replace(words, others)
        exec(compile(code, block.where, "exec"), names)
    assert not unused, "nothing on the page has these words"


@pytest.mark.parametrize(
    ("code", "where"), [(call.code, call.where) for page in PAGES for call in calls(page)], ids=lambda text: str(text)
)
def test_calls_could_be_made(code: str, where: str) -> None:
    check(code)


@pytest.mark.parametrize(
    "code",
    [
        'tokenprune.patch(vit, "no_such_method", keep=0.5)',
        "tokenprune.no_such_verb(vit)",
        "tokenprune.report(vit, keep=0.5)",
        'tokenprune.patch(vit, "tome", no_such_option=1)',
    ],
)
def test_a_call_that_could_not_is_seen(code: str) -> None:
    with pytest.raises((AttributeError, TypeError, AssertionError)):
        check(code)


def check(code: str) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Attribute)
    verb = getattr(tokenprune, call.func.attr)
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    inspect.signature(verb).bind(*call.args, **named)
    methods = [word.value for word in call.args[1:] if isinstance(word, ast.Constant)]
    for method in methods:
        assert method in METHODS
        known = set(inspect.signature(tokenprune.patch).parameters) | set(inspect.signature(verb).parameters)
        options = {name for info in tokenprune.methods() if info.name == method for name in info.options}
        assert set(named) <= known | options
