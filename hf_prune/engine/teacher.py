"""What a student is matched with: the dense model's next-token distributions, cached in little memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class TeacherLogits:
    """The most likely tokens of every position and what is left for all the others together.

    Attributes:
        tokens: int32 [..., kept].
        log_probabilities: float32 [..., kept], at the temperature they were made with.
        rest: float32 [...], log probability of all tokens that were not kept; -inf where all were.
    """

    tokens: Tensor
    log_probabilities: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float, kept: int) -> TeacherLogits:
        """From logits [..., vocabulary]."""
        log_probabilities = functional.log_softmax(logits.float() / temperature, dim=-1)
        top = log_probabilities.topk(min(kept, logits.shape[-1]), dim=-1)
        return cls(top.indices.int(), top.values, _rest(top.values, logits.shape[-1]))

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        """KL(teacher || student) of each position, float32 [...], in nats.

        The tokens that were not kept count as one: a lower bound of the whole divergence, equal to it where all tokens
        were kept.
        """
        scaled = logits.float() / temperature
        student = scaled.gather(-1, self.tokens.long()) - scaled.logsumexp(dim=-1, keepdim=True)
        terms = (self.log_probabilities.exp() * (self.log_probabilities - student)).sum(dim=-1)
        if self.tokens.shape[-1] == logits.shape[-1]:
            return terms
        return terms + self.rest.exp() * (self.rest - _rest(student, logits.shape[-1]))


def _rest(log_probabilities: Tensor, vocabulary: int) -> Tensor:
    """log(1 - sum of probabilities), float32; its gradient stays finite where nearly nothing is left."""
    if log_probabilities.shape[-1] == vocabulary:
        return log_probabilities.new_full(log_probabilities.shape[:-1], -torch.inf)
    left = 1 - log_probabilities.exp().sum(dim=-1)
    return left.clamp(min=1e-6).log()
