"""Text-to-image pipelines of diffusers: what may be removed, removing it, and what it costs."""
