"""Dense2MoE (arXiv 2510.09094): feed-forwards of a dense denoiser become mixtures of experts, and
of groups of its blocks only some run."""
