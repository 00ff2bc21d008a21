"""Hub cards: what a model or adapter says about itself on the Hub, filled from what is known and nothing else."""

from .adapter_card import adapter_card
from .model_card import model_card

__all__ = ["adapter_card", "model_card"]
