"""Several prototypes per class on the sphere: PALM (arXiv 2402.02653), and CIDER (arXiv 2203.04450) with one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.ssl.losses import full_precision, positive_temperature
from gradmix.ssl.processes import gather
from gradmix.ssl.targets import check_rows

ROUNDS = 3  # of Sinkhorn's scaling


class PrototypeLoss(nn.Module):
    """Draws projections to prototypes of their class, and prototypes of different classes apart.

    A call on raw views moves the prototypes first, by a moving average of the projections that are assigned to them.
    Who is assigned to whom is reciprocal: exp(similarity / sharpness), scaled in turn so that each prototype gets as
    much as any other and each projection gives 1 (Sinkhorn), then cut to the prototypes of the projection's class, and
    to the ``neighbours`` nearest of these. The loss is the likelihood of the projections under their prototypes, plus
    ``contrast`` times a contrastive loss of the prototypes among each other, whose gradient flows through the average.

    As in the authors' code the weights of a projection's prototypes stand outside the logarithm. With one prototype per
    class, the likelihood is CIDER's compactness, and the contrast its dispersion but for a constant; CIDER moves its
    prototypes row by row, this once per batch. Prototypes begin at random places, the same for the same sizes.

    Args:
        classes: K.
        dim: D, of the projections.
        per_class: M.
        temperature: T > 0 of the likelihood.
        neighbours: at most so many prototypes of its class per projection; None: all M.
        momentum: of the prototypes' moving average.
        sharpness: of the assignment, above 0; smaller is nearer to one prototype each.
        contrast: weight of the contrastive loss of the prototypes.
        contrast_temperature: its temperature, above 0.

    Attributes:
        prototypes: ``[K * M, D]``, L2-normalised; rows k * M to (k + 1) * M belong to class k.
    """

    prototypes: Tensor

    def __init__(
        self,
        classes: int,
        dim: int,
        per_class: int = 6,
        temperature: float = 0.1,
        neighbours: int | None = 5,
        momentum: float = 0.99,
        sharpness: float = 0.05,
        contrast: float = 1.0,
        contrast_temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.classes, self.per_class = classes, per_class
        self.neighbours = per_class if neighbours is None else min(neighbours, per_class)
        self.temperature, self.sharpness = positive_temperature(temperature), positive_temperature(sharpness)
        self.contrast, self.contrast_temperature = contrast, positive_temperature(contrast_temperature)
        self.momentum = momentum
        drawn = torch.randn(classes * per_class, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("prototypes", F.normalize(drawn, dim=1))

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        other: Tensor | None = None,
        kept: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """
        Args:
            z: ``[N, D]``, L2-normalised.
            labels: ``[N]`` int64 in 0..K-1.
            other: ``[N]``, for mixed images: labels of what was mixed in. With them the likelihood alone is
                returned, of both classes for the share of each, and no prototype moves.
            kept: ``[N]``, with ``other``: the share of each image that is still itself.
            temperature: of the likelihood in this call, where it changes while training.

        Returns:
            Scalar; the mean over processes is the loss of the concatenated batch.

        Raises:
            ValueError: shapes that do not fit, or one of ``other`` and ``kept`` without its pair.
        """
        check_rows(z, self.prototypes.shape[1], labels, other, kept)
        temperature = self.temperature if temperature is None else positive_temperature(temperature)
        with torch.autocast(z.device.type, enabled=False):
            z = full_precision(z)
            everyone, first = gather(z)
            mine = slice(first, first + len(z))
            if other is not None and kept is not None:
                log = self._reciprocal(everyone.detach(), self.prototypes.to(z.dtype))[mine]
                logits = self.logits(z, temperature)
                own, theirs = (_likelihood(logits, _share(log, self._nearest(log, of))) for of in (labels, other))
                kept = kept.to(z.dtype)
                return (kept * own + (1 - kept) * theirs).mean()
            old = self.prototypes.to(z.dtype)
            log = self._reciprocal(everyone.detach(), old)
            nearest = self._nearest(log, gather(labels)[0])
            share = F.normalize(_share(log, nearest), p=1, dim=0)  # [N, KM], of what each prototype is assigned
            moved = F.normalize(self.momentum * old + (1 - self.momentum) * (share.T @ everyone), dim=1)
            now = moved.detach()
            self.prototypes.copy_(now)
            weights = _share(self._reciprocal(everyone.detach(), now), nearest)[mine]  # anew, for the same neighbours
            loss = _likelihood(z @ now.T / temperature, weights).mean()
            return loss + self.contrast * self._contrast(moved) if self.contrast else loss

    def logits(self, z: Tensor, temperature: float | None = None) -> Tensor:
        """Similarities ``[N, K * M]`` of L2-normalised ``z`` ``[N, D]`` to all prototypes, by the temperature."""
        with torch.autocast(z.device.type, enabled=False):
            z = full_precision(z)
            return z @ self.prototypes.T.to(z.dtype) / (self.temperature if temperature is None else temperature)

    def _reciprocal(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """How much of each projection goes to each prototype, ``[N, KM]``; logarithms, of rows that sum to 1."""
        log = z @ prototypes.T / self.sharpness
        for _ in range(ROUNDS):
            log = log.log_softmax(0)
            log = log.log_softmax(1)
        return log

    def _nearest(self, log: Tensor, labels: Tensor) -> Tensor:
        """Which prototypes a row goes to at all, ``[N, KM]`` bool: the nearest of its class."""
        owner = torch.arange(self.classes, device=log.device).repeat_interleave(self.per_class)
        of_class = labels[:, None] == owner
        if self.neighbours == self.per_class:
            return of_class
        nearest = log.masked_fill(~of_class, -torch.inf).topk(self.neighbours, dim=1).indices
        return torch.zeros_like(of_class).scatter(1, nearest, True)

    def _contrast(self, prototypes: Tensor) -> Tensor:
        """SupCon of the prototypes; with one per class, how alike they are."""
        similarity = prototypes @ prototypes.T / self.contrast_temperature
        own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        owner = torch.arange(self.classes, device=similarity.device).repeat_interleave(self.per_class)
        same = ((owner[:, None] == owner) & ~own).to(similarity.dtype)
        others = similarity.masked_fill(own, -torch.inf).logsumexp(1)
        return (others - (F.normalize(same, p=1, dim=1) * similarity).sum(1)).mean()


def _share(log: Tensor, nearest: Tensor) -> Tensor:
    """Weights cut to some prototypes; rows sum to 1."""
    return log.masked_fill(~nearest, -torch.inf).softmax(1)


def _likelihood(logits: Tensor, weights: Tensor) -> Tensor:
    """Minus the log-likelihood of each row, ``[N]``: among all prototypes, under its own."""
    return logits.logsumexp(1) - (weights * logits).sum(1)
