"""What the rows of an objective take of the text."""

from llmkit.plan.batch import PlanError
from llmkit.recipe.objectives import ObjectiveSettings, RowLayout
from llmkit.recipe.schema import Pretrain
from llmkit.registry import goal_of


def layout_of(section: Pretrain) -> RowLayout:
    """What a row of this section takes of a stream of tokens.

    An objective with settings says so itself; one without predicts each token from those before it, so a row sees one
    token of the next: its last target.

    Raises:
        PlanError: The context has no room for a row.
    """
    sections = goal_of(section.objective).sections
    context = section.model.context
    if not sections:
        return RowLayout(context, overlap=1)
    settings: ObjectiveSettings = getattr(section, sections[0])
    layout = settings.layout(context)
    if layout.stride < 1:
        raise PlanError(
            f"model.context is {context} tokens, too few for a row of `{section.objective}`",
            hint="pretrain.model.context=128",
        )
    return layout
