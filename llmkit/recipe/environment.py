"""`${env:NAME}` and `${env:NAME:-default}`, the only interpolation a recipe has.

The value takes the variable's text as if it had been written there: without quotes around it, `${env:STEPS}`
may become a number. A variable whose name looks like a secret (TOKEN, KEY, SECRET, PASSWORD, CREDENTIAL), or whose
value does (a URL with a password or a signature, a token of a known form), keeps its expression wherever values are
written down (`resolved.yaml`, `show`, `diff`, messages); its value is in memory only. A secret that stands in the
recipe itself, or in a word of the command line, is a problem: recipes are copied, shown and sent.
"""

import re
from collections.abc import Mapping

from llmkit.recipe.credentials import looks_secret
from llmkit.recipe.positions import Node, Spot, scalars
from llmkit.recipe.problems import MOST_SHOWN, Problem
from llmkit.recipe.reading import scalar
from llmkit.registry import nearest

_START = "${env:"
_EXPRESSION = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SECRET = re.compile(r"TOKEN(?!S)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def is_secret(expression: str, value: object = None) -> bool:
    """Whether an expression reads a variable whose name, or what came of it, looks like a secret."""
    named = any(_SECRET.search(match[1]) for match in _EXPRESSION.finditer(expression))
    return named or (isinstance(value, str) and looks_secret(value))


def interpolate(root: Node, env: Mapping[str, str]) -> list[Problem]:
    """Put the variables' values in place; returns what could not be, and secrets that stand there openly."""
    problems: list[Problem] = []
    for node in {id(node): node for node in scalars(root)}.values():
        problems += _open_secret(node)
        if node.expression is None:
            continue
        if _START not in node.expression:
            node.expression = None
            continue
        # Looking for a name that was meant takes a while each time.
        problems += _replace(node, env, guess=len(problems) < MOST_SHOWN)
    return problems


def _open_secret(node: Node) -> list[Problem]:
    written = node.expression or node.value
    if not isinstance(written, str) or not looks_secret(
        _EXPRESSION.sub(lambda match: match[2] or "", written)
    ):
        return []
    hint = "put it into the environment and write `${env:NAME}` in its place, such as `${env:DATA_TOKEN}`"
    return [Problem(node.spot, "a password, signature or token stands here in the open", hint)]


def _replace(node: Node, env: Mapping[str, str], *, guess: bool) -> list[Problem]:
    text = node.expression or ""
    matches = list(_EXPRESSION.finditer(text))
    if len(matches) != text.count(_START):
        hint = "write `${env:NAME}` or `${env:NAME:-default}`"
        return [Problem(node.spot, f"`{text}` is no complete expression", hint)]
    known = env if guess else {}
    problems = [_unset(node.spot, m[1], known) for m in matches if m[1] not in env and m[2] is None]
    if not problems:
        value = _EXPRESSION.sub(lambda m: env.get(m[1]) or (m[2] if m[2] is not None else ""), text)
        node.value = value if node.quoted else scalar(value)
    return problems


def _unset(spot: Spot, name: str, env: Mapping[str, str]) -> Problem:
    close = nearest(name, env)
    guess = f"; did you mean `{close}`?" if close else ""
    hint = f"set it, or give a default: `${{env:{name}:-...}}`{guess}"
    return Problem(spot, f"the environment variable {name} is not set", hint)
