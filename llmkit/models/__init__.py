"""Build and load models, count them, and the kernels that make them fast."""

from transformers.utils import logging

# One reporter speaks to the person; bars of libraries would break into its lines.
logging.disable_progress_bar()
