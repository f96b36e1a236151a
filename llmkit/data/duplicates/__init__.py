"""Copies, near copies, repeated lines and evaluation data: found by hashes, in memory that stays small."""
