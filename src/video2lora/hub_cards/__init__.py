"""Hub cards: what a model or adapter says about itself on the Hub, filled from what is known and nothing else."""

from .adapter_card import adapter_card
from .model_card import model_card
from .training_card import GENERATED, TrainingFacts

__all__ = ["GENERATED", "TrainingFacts", "adapter_card", "model_card"]
