"""Speed of each cleaning step in seconds of one core: `python -m benchmarks.cleaning [FILE ...]`.

Without files it reads the Python standard library's sources. A file's text is cut into documents of 8,000 characters.
"""

import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from llmkit.data.clean.cleaner import Cleaner, utf8_size
from llmkit.recipe.preparation import Filter, Normalise, PersonalData, Prepare

LENGTH = 8_000
MOST = 10_000_000

STEPS = {
    "normalise": Prepare(normalise=Normalise()),
    "personal data": Prepare(personal_data=PersonalData()),
    "normalise and personal data": Prepare(normalise=Normalise(), personal_data=PersonalData()),
    "language": Prepare(filter=Filter(languages=["en", "zh"], language_score=0.01)),
    "rules: gopher": Prepare(filter=Filter(rules=["gopher"])),
    "rules: gopher-repetition": Prepare(filter=Filter(rules=["gopher-repetition"])),
    "rules: c4": Prepare(filter=Filter(rules=["c4"])),
    "rules: fineweb": Prepare(filter=Filter(rules=["fineweb"])),
    "rules: chinese": Prepare(filter=Filter(rules=["chinese"])),
}


def documents(paths: list[Path]) -> list[str]:
    """Up to 10 million characters of the files, cut into documents."""
    text = ""
    for path in paths:
        text += path.read_text("utf-8", "replace")
        if len(text) >= MOST:
            break
    return [text[start : start + LENGTH] for start in range(0, min(len(text), MOST), LENGTH)]


def seconds(work: Callable[[str], object], texts: list[str]) -> float:
    """Processor time, as other programs may run."""
    begin = time.process_time()
    for text in texts:
        work(text)
    return time.process_time() - begin


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    texts = documents(files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    size = sum(map(utf8_size, texts))
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB")
    for name, spec in STEPS.items():
        clean = Cleaner(spec).clean
        clean(texts[0])  # load what is loaded once
        print(f"{name:30s} {size / seconds(clean, texts) / 1e6:7.1f} MB/s")


if __name__ == "__main__":
    main()
