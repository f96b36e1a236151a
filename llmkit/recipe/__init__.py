"""Recipes: what a person asked for, read from YAML, checked, and explained."""

from llmkit.recipe.explain import Explanation, explain
from llmkit.recipe.load import Loaded, load_recipe
from llmkit.recipe.locate import packaged_names
from llmkit.recipe.positions import Origin
from llmkit.recipe.published import json_schema, schema_text
from llmkit.recipe.resolved import Difference, diff, resolved_yaml, show_yaml, values
from llmkit.recipe.schema import Recipe
from llmkit.recipe.templates import render_template, template_kinds

__all__ = [
    "Difference",
    "Explanation",
    "Loaded",
    "Origin",
    "Recipe",
    "diff",
    "explain",
    "json_schema",
    "load_recipe",
    "packaged_names",
    "render_template",
    "resolved_yaml",
    "schema_text",
    "show_yaml",
    "template_kinds",
    "values",
]
