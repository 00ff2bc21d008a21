"""Hub cards: what a model or adapter says about itself on the Hub, filled from what is known and nothing else."""
