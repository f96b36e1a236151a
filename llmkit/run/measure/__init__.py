"""Ways to measure a model, one file each; `registry.EVALUATIONS` names them.

Each has `measure(subject, asked) -> Measurement`: it finds the data, asks the model, and writes nothing. What is done
with measurements (showing, comparing, gates, reports) is `llmkit.run.evaluate`, the same for all.
"""
