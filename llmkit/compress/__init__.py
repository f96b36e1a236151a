"""Make a model smaller or faster: model in, model out."""
