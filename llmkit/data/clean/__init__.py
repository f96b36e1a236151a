"""Cleaning one document at a time: normalise, filter, mark personal data. Each step is a function of the text."""
