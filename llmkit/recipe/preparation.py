"""What may be done to text before anything is learnt from it: the settings of `tokenize.prepare`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmkit.recipe.block import Block, Files, as_list
from llmkit.recipe.units import Count, Ratio, Several

Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Languages = Annotated[
    list[Language], BeforeValidator(as_list, json_schema_input_type=Language | list[Language])
]
RuleSet = Literal["gopher", "gopher-repetition", "c4", "fineweb", "chinese"]
RuleSets = Annotated[list[RuleSet], BeforeValidator(as_list, json_schema_input_type=RuleSet | list[RuleSet])]
PersonalKind = Literal["mail", "phone", "id", "card", "iban", "ip", "secret"]


class Normalise(Block):
    """Put text into one form."""

    fix: bool = True
    """Repair text that was decoded wrongly (`schÃ¶n` to `schön`), with ftfy."""
    unicode: Literal["keep", "nfc", "nfkc"] = "nfc"
    """Unicode form: `nfc` joins letters and accents, `nfkc` also makes ligatures and other variants plain."""
    control: bool = True
    """Take out control characters (not line ends and tabs), zero-width and byte-order marks."""
    html: bool = False
    """Take the documents for HTML pages and keep their text."""
    half_width: bool = False
    """Make full-width letters, digits and signs (`Ａ１％`) half-width; Chinese punctuation stays."""
    whitespace: bool = True
    """Take blanks off line ends, make three or more line ends two, trim the document; indentation stays."""


class Filter(Block):
    """Drop whole documents."""

    min_chars: Count | None = None
    """Drop documents with fewer characters."""
    max_chars: Count | None = None
    """Drop documents with more characters."""
    languages: Languages = []
    """Keep documents in these languages only (`en`, `zh`), as a fastText model finds them."""
    language_score: Ratio = 0.5
    """How sure the model must be of the language."""
    rules: RuleSets = []
    """Published quality rules: `gopher` (length, symbols, stop words), `gopher-repetition`, `c4`, `fineweb`, and
    `chinese`, variants of these for text without spaces. They judge whole documents and edit none."""


class PersonalData(Block):
    """Replace personal data and secrets by marks such as `[MAIL]`. It reduces them; it makes nothing anonymous."""

    kinds: list[PersonalKind] = ["mail", "phone", "id", "card", "iban", "ip", "secret"]
    """What to look for: `id` are national numbers with a checksum, `secret` are keys, tokens and passwords."""
    detector: str | None = None
    """A function of your own, `package.module:function`: it takes the text, gives (start, end, kind) triples, and
    depends on the text alone."""


class NearDuplicates(Block):
    """Which documents count as near copies of each other."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The share of common word sequences (Jaccard) from which two documents are near copies."""
    ngram: Count = 5
    """Words in a sequence; in Chinese, characters."""
    permutations: Several = 128
    """Length of a MinHash signature: more finds and judges better, and takes longer."""


class Duplicates(Block):
    """Keep one of each group of copies."""

    exact: bool = True
    """Drop documents whose text is the same, but one."""
    lines: Count | None = None
    """Take out lines that stand in more than so many documents (menus, footers); `null` leaves lines alone."""
    near: NearDuplicates | None = None
    """Drop near copies, but the longest: `near: {}` or `near: {threshold: 0.7}`."""


class Decontaminate(Block):
    """Drop documents that hold a piece of evaluation data."""

    files: Files
    """The evaluation files: txt, jsonl, csv, tsv, parquet; every text in them counts."""
    ngram: Several = 13
    """Drop a document that shares so many words in a row with them; in Chinese, characters."""


class Prepare(Block):
    """What is done to the text, in this order: normalise, filter, personal data, evaluation data, duplicates."""

    normalise: Normalise | None = None
    """One form: encoding damage, Unicode, control characters, HTML, widths."""
    filter: Filter | None = None
    """Length, language, quality."""
    personal_data: PersonalData | None = None
    """Mail addresses, phone numbers, national ids, cards, accounts, IP addresses, secrets become marks."""
    decontaminate: Decontaminate | None = None
    """Evaluation data is kept out."""
    duplicates: Duplicates | None = None
    """Copies and near copies."""
