"""What a model learns: one file each; `base.py` has the contract."""
