"""Shared core: scores in, masks out. Knows no model, file or image."""
