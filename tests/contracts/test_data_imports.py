"""The data package never imports torch, and imports the slow packages only when it needs them."""

import subprocess
import sys

SLOW = ("torch", "transformers", "datasets", "accelerate", "pyarrow", "huggingface_hub")


def test_importing_data_stays_light():
    modules = ("order", "rows", "loader", "split", "text", "sources", "tokenizers", "shards")
    script = "import sys\n" + "".join(f"import llmkit.data.{module}\n" for module in modules)
    script += f"print([name for name in {SLOW!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
