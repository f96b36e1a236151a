"""`python -m llmkit` is the same as `llmkit`."""

import sys

from llmkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
