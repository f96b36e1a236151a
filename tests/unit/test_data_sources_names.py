import pytest

from llmkit.data.sources import source_name, source_names
from llmkit.errors import RecipeError
from llmkit.recipe.schema import Source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/web/part-1.jsonl.gz", "data/web/part-2.jsonl.gz", "books-en.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ("books-en.txt", "books-en"),
        ("data/web/part-1.jsonl.gz", "part-1"),
        ("data/web", "web"),
        ("data/web/", "web"),
        ("data/web/*.gz", "web"),
        ("data/web/part-*.jsonl.gz", "web"),
        ("data/**/*.gz", "data"),
        ("data/*/part-1.jsonl.gz", "data"),
        ("data/books-*.txt", "books"),
        ("books*.txt", "books"),
        ("*.txt", "books-en"),
        (["data/web/*.gz", "books-en.txt"], "web"),
        ("s3://bucket/corpus/wiki-*.parquet", "wiki"),
        ("s3://bucket/corpus/*.parquet", "corpus"),
        ("https://me:pw@host/a/b.jsonl.zst?sig=1", "b"),
        ("stdlib:", "stdlib"),
        ("-", "stdin"),
    ],
)
def test_names_made_from_files(here, files, name):
    assert source_name(Source(files=files), here) == name


def test_equal_names_are_numbered_and_given_ones_are_kept(here):
    files = ("data/web", "data/web/*.gz", "data/web")
    sources = [Source(files=name) for name in files]
    assert source_names(sources, here) == ["web", "web-2", "web-3"]
    given = Source(files="books-en.txt", name="web-2")
    assert source_names([*sources, given], here) == ["web", "web-3", "web-4", "web-2"]
    with pytest.raises(RecipeError, match="two sources are called 'web-2'"):
        source_names([given, given], here)
