"""Training: `loop.py` is where to start reading."""
