"""Only its name is looked for."""
