"""Linear probe: a softmax classifier on cached, frozen features."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from gradmix.eval.search import blocks, check_features, check_labels, like


class LinearProbe:
    """Multinomial logistic regression by full-batch L-BFGS, on the device the features are on.

    Features are standardised with the training set's mean and deviation. The L2 strength is the one of
    `weight_decay` with the best accuracy on a held-out part of the training set (stratified, drawn by the
    seed; the smaller log loss on a tie); the final weights are then fitted on the whole of it. The test set
    chooses nothing.

    Args:
        weight_decay: a strength or several to choose from: the objective is mean cross-entropy +
            weight_decay / 2 * |W|^2 on standardised features, scikit-learn's with C = 1 / (weight_decay * N).
        holdout: share of each class held out for that choice, at least one image, none of a class with one.
        max_iter: L-BFGS iterations per fit; fits start from the weights of the next stronger strength.
        seed: of the held-out part.

    After `fit`: `classes_` (labels that occur, sorted), `weight_` `[K, F]` and `bias_` `[K]` in float64, for
    raw features: logits = features @ weight_.T + bias_; `weight_decay_`, the strength chosen.
    """

    def __init__(self, weight_decay=(1, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6), holdout=0.2, max_iter=200, seed=0):
        self.weight_decay = sorted(np.atleast_1d(weight_decay).tolist(), reverse=True)
        if not self.weight_decay or self.weight_decay[-1] < 0:
            raise ValueError(f"weight_decay: expected numbers >= 0, got {weight_decay}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout: expected a share in (0, 1), got {holdout}")
        self.holdout, self.max_iter, self.seed = holdout, max_iter, seed

    def fit(self, features, labels):
        """Fit to training features `[N, F]` and integer labels `[N]` of at least two classes."""
        device = features.device if isinstance(features, torch.Tensor) else "cpu"
        rows = check_features("features", features)
        labels = check_labels("labels", labels, len(rows))
        self.classes_, positions = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"labels: a probe needs two classes, got only {self.classes_[0]}")

        mean = rows.mean(axis=0, dtype=np.float64)
        # numpy's own std would hold all deviations in float64 at once
        scale = np.sqrt(sum(np.square(rows[block] - mean).sum(axis=0) for block in blocks(rows.shape)) / len(rows))
        scale[scale <= 1e-12 * np.abs(mean)] = 1  # a constant column says nothing; don't blow up its rounding
        scale[scale == 0] = 1
        x = np.empty(rows.shape, np.float32)
        for block in blocks(rows.shape):
            x[block] = (rows[block] - mean) / scale
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(positions).to(device)

        self.weight_decay_ = self._choose_strength(x, y, positions)
        weight = self._minimise(x, y, [s for s in self.weight_decay if s >= self.weight_decay_])[-1]
        weight = weight.cpu().double().numpy()
        self.weight_ = weight[:, :-1] / scale
        self.bias_ = weight[:, -1] - self.weight_ @ mean
        return self

    def predict_proba(self, features):
        """Softmax probabilities `[N, K]` float32, columns in the order of `classes_`."""
        logits = self._logits(features)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return like((odds / odds.sum(axis=1, keepdims=True)).astype(np.float32), features)

    def predict(self, features):
        """The class with the largest logit, `[N]` int64."""
        return like(self.classes_[self._logits(features).argmax(axis=1)], features)

    def _logits(self, features):
        rows = check_features("features", features, width=self.weight_.shape[1])
        return np.concatenate([rows[block] @ self.weight_.T + self.bias_ for block in blocks(rows.shape)])

    def _choose_strength(self, x, y, positions):
        held = torch.from_numpy(self._held_out(positions)).to(x.device)
        if len(self.weight_decay) == 1 or not held.any():
            return self.weight_decay[len(self.weight_decay) // 2]

        def merit(weight):
            logits = _logits(x[held], weight)
            accuracy = (logits.argmax(dim=1) == y[held]).double().mean()
            return accuracy.item(), -cross_entropy(logits.double(), y[held]).item()

        merits = [merit(weight) for weight in self._minimise(x[~held], y[~held], self.weight_decay)]
        return self.weight_decay[merits.index(max(merits))]

    def _held_out(self, positions):
        generator = np.random.default_rng(self.seed)
        held = np.zeros(len(positions), dtype=bool)
        for position in range(len(self.classes_)):
            rows = generator.permutation(np.flatnonzero(positions == position))
            held[rows[: max(1, round(self.holdout * len(rows))) if len(rows) > 1 else 0]] = True
        return held

    def _minimise(self, x, y, strengths):
        """Weights `[K, F + 1]`, the bias last, at the minimum for each strength."""
        weight = torch.zeros(len(self.classes_), x.shape[1] + 1, device=x.device, requires_grad=True)
        minima = []
        for strength in strengths:
            solver = torch.optim.LBFGS(
                [weight],
                max_iter=self.max_iter,
                tolerance_grad=1e-5,
                tolerance_change=1e-8,
                history_size=10,
                line_search_fn="strong_wolfe",
            )

            def objective(solver=solver, strength=strength):
                solver.zero_grad()
                loss = cross_entropy(_logits(x, weight), y) + strength / 2 * weight[:, :-1].square().sum()
                loss.backward()
                return loss

            solver.step(objective)
            minima.append(weight.detach().clone())
        return minima


def _logits(x, weight):
    return x @ weight[:, :-1].T + weight[:, -1]
