"""Captioned images, and the scenes that the small pipelines were trained on."""
