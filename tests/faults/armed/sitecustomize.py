"""Python runs this before a program's first line when its folder is on PYTHONPATH: see `injection.environment`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from injection import arm_from_environment

arm_from_environment()
