"""`llmkit init`: commented recipes to start from, kept as files beside this one."""

from pathlib import Path

from llmkit.errors import UsageError
from llmkit.registry import nearest

_FOLDER = Path(__file__).resolve().parent / "templates"


def template_kinds() -> dict[str, str]:
    """The kinds of templates, each with its first comment line."""
    paths = sorted(_FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text("utf-8").splitlines()[0].lstrip("# ") for path in paths}


def render_template(kind: str = "gpt") -> str:
    """The text of a commented recipe.

    Raises:
        UsageError: There is no such kind; the message lists those there are.
    """
    kinds = template_kinds()
    if kind not in kinds:
        close = nearest(kind, kinds)
        guess = f"did you mean `{close}`? " if close else ""
        raise UsageError(f"there is no template `{kind}`", hint=f"{guess}templates: {', '.join(kinds)}")
    return (_FOLDER / f"{kind}.yaml").read_text("utf-8")
