"""What every group of settings has in common."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Block(BaseModel):
    """A group of settings: frozen, strictly typed, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def as_list(value: object) -> object:
    """One source or file may stand without the brackets of a list."""
    return [value] if isinstance(value, str | dict | BaseModel) else value


Files = Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | list[str])]
Words = Files
"""A list of words, of which one may stand without the brackets."""
