"""OptiPrune (arXiv 2507.00789): initial noise guided by attention, and tokens pruned by similarity,
both while sampling. The weights stay as they are."""
