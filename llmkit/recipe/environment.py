"""`${env:NAME}` and `${env:NAME:-default}`, the only interpolation a recipe has.

The value takes the variable's text as if it had been written there: without quotes around it, `${env:STEPS}`
may become a number. A variable whose name looks like a secret (TOKEN, KEY, SECRET, PASSWORD, CREDENTIAL) keeps
its expression wherever values are written down (`resolved.yaml`, `show`, `diff`, messages); its value is in
memory only.
"""

import re
from collections.abc import Mapping

from llmkit.recipe.positions import Node, Spot, scalars
from llmkit.recipe.problems import Problem
from llmkit.recipe.reading import scalar
from llmkit.registry import nearest

_START = "${env:"
_EXPRESSION = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SECRET = re.compile(r"TOKEN(?!S)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def is_secret(expression: str) -> bool:
    """Whether an expression reads a variable whose name looks like a secret."""
    return any(_SECRET.search(match[1]) for match in _EXPRESSION.finditer(expression))


def interpolate(root: Node, env: Mapping[str, str]) -> list[Problem]:
    """Put the variables' values in place; returns what could not be."""
    problems: list[Problem] = []
    for node in {id(node): node for node in scalars(root)}.values():
        if node.expression is None:
            continue
        if _START not in node.expression:
            node.expression = None
            continue
        problems += _replace(node, env)
    return problems


def _replace(node: Node, env: Mapping[str, str]) -> list[Problem]:
    text = node.expression or ""
    matches = list(_EXPRESSION.finditer(text))
    if len(matches) != text.count(_START):
        hint = "write `${env:NAME}` or `${env:NAME:-default}`"
        return [Problem(node.spot, f"`{text}` is no complete expression", hint)]
    problems = [_unset(node.spot, m[1], env) for m in matches if m[1] not in env and m[2] is None]
    if not problems:
        value = _EXPRESSION.sub(lambda m: env.get(m[1]) or (m[2] if m[2] is not None else ""), text)
        node.value = value if node.quoted else scalar(value)
    return problems


def _unset(spot: Spot, name: str, env: Mapping[str, str]) -> Problem:
    close = nearest(name, env)
    guess = f"; did you mean `{close}`?" if close else ""
    hint = f"set it, or give a default: `${{env:{name}:-...}}`{guess}"
    return Problem(spot, f"the environment variable {name} is not set", hint)
