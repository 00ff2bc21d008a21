"""Trainer: losses of an adapter's answers, as one number for each query."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..modeling.turns import Labelled


def kl_per_token(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the student from the teacher, `sum p_t (log p_t - log p_s)`, times the squared temperature.

    Args:
        student_logits: `[tokens, vocabulary]`.
        teacher_logits: `[tokens, vocabulary]`.
        temperature: both logits are divided by it.

    Returns:
        `[tokens]`, float32 at least.
    """
    student, teacher = (_wide(logits) / temperature for logits in (student_logits, teacher_logits))
    log_s, log_t = log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1) * temperature**2


def kl_top_k_per_token(student_logits: Tensor, token_ids: Tensor, logits: Tensor, logsumexp: Tensor) -> Tensor:
    """The same at temperature 1 from a teacher's k largest logits: the rest of the vocabulary counts as one outcome.

    A lower bound of the exact divergence, and equal to it where the teacher's rest is spread as the student's.

    Args:
        student_logits: `[tokens, vocabulary]`.
        token_ids: `[tokens, k]`, the teacher's likeliest tokens.
        logits: `[tokens, k]`, their logits.
        logsumexp: `[tokens]`, the teacher's log of the sum of all exponentials.

    Returns:
        `[tokens]`, float32 at least.
    """
    log_s = log_softmax(_wide(student_logits), dim=-1).gather(-1, token_ids)
    log_t = _wide(logits) - _wide(logsumexp)[:, None]
    rest_s, rest_t = (torch.log((1 - log_p.exp().sum(-1)).clamp_min(1e-9)) for log_p in (log_s, log_t))
    inside = (log_t.exp() * (log_t - log_s)).sum(-1)
    return inside + rest_t.exp() * (rest_t - rest_s)


def mean_per_query(token_losses: Tensor, labels: Tensor, turns: Tensor | None = None) -> Tensor:
    """Each query's mean over its labelled tokens (the recipe's reduction).

    Args:
        token_losses: `[labelled tokens]`, in row order.
        labels: `[rows, tokens]`, -100 where there is none; as in a causal model a query's first token is predicted by
            nothing.
        turns: `[rows, tokens]`, where a row holds several queries: see [`Video2LoraModel.forward`].

    Returns:
        `[queries]`; 0 for a query without labels.
    """
    return Labelled.of(labels, turns).mean_per_query(token_losses)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
