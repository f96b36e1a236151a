"""Small files of rows for tests, and how they are read."""

import json

import pytest

from llmkit.data.records import read_rows
from llmkit.errors import DataError
from llmkit.recipe.labelled import Labelled


def write(folder, name, content):
    """A file of text, or of one JSON object a line where `content` is a list."""
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")
    return path


def read(folder, name, content, task, training=True, **settings):
    """What `read_rows` finds in one file."""
    data = Labelled(files=[str(write(folder, name, content))], **settings)
    return read_rows(data, task, base=folder, training=training)


def rows(folder, name, content, task, **settings):
    """The canonical rows of one file, without their places."""
    found = read(folder, name, content, task, **settings)
    return [{key: value for key, value in row.items() if key != "place"} for row in found.rows]


def refused(folder, name, content, task, **settings):
    """The message and the hint of the error that reading gives, as one text."""
    with pytest.raises(DataError) as caught:
        read(folder, name, content, task, **settings)
    return str(caught.value)
