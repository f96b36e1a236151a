"""Figures from what a model said: rows in, numbers out. NumPy and the standard library only, no torch.

One rule for scales: a figure has the scale of the tool that defines it. Shares lie in 0-1, as in scikit-learn,
seqeval and rouge-score; BLEU, chrF and the exact match and F1 of answers in 0-100, as sacrebleu and the SQuAD script
print them.

One rule for 0/0: nothing found and nothing to find scores 0, never NaN, so that a figure can be compared, drawn and
stopped on; where a tool decides otherwise, the function says so. No rows at all are an error.
"""
