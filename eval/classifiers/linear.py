"""Linear probe, protocol ``cached``: a softmax classifier on features that were extracted once."""

import sys
import time
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from gradmix.eval.features.arrays import Array, blocks, check_features, check_labels, like
from gradmix.ssl.machine import duration

SELECTION = 0.25  # length of the training that chooses, as a share of the final one
LEAST_STEPS = 2000  # of the final training, whatever the number of epochs; small sets need them to converge
MOST_CHOOSING = 4000  # steps of the training that chooses, enough to rank settings; a million rows would take 80,000
TIMED, LONG = 20, 300  # steps after which the rest is known; seconds of it that are told
MOMENTUM = 0.9
Settings = float | Sequence[float]


class LinearProbe:
    """Multinomial logistic regression by SGD, for many learning rates and weight decays at once.

    All S settings are trained as one batched head `[S, K, F]`: a mini-batch is read once and multiplied with all of
    them in one product. The setting is the one with the best accuracy on a held-out part of the training set
    (stratified, drawn by the seed; the smaller log loss on a tie); the final weights are then trained on the whole
    of it. The test set chooses nothing. Features are standardised with the training set's mean and deviation; those
    that are memory-mapped are read batch by batch.

    Args:
        lr: step sizes, in units of 1 / L, L being the largest curvature that the loss can have on these features (half
            of the largest eigenvalue of their second moment). SGD with momentum diverges near 4; it is annealed to 0
            along a cosine.
        weight_decay: the objective is mean cross-entropy + weight_decay / 2 * |W|^2 on standardised features,
            scikit-learn's with C = 1 / (weight_decay * N).
        epochs: of the final training, at least `LEAST_STEPS` steps; choosing takes `SELECTION` of them, and at most
            `MOST_CHOOSING` steps, which suffice to rank the settings.
        holdout: share of each class held out for the choice, at least one image, none of a class with one.
        seed: of the held-out part and the order of the images.
        device: where to train; None: where the features are.

    After `fit`: `classes_` (labels that occur, sorted), `weight_` `[K, F]` and `bias_` `[K]` in float64, for raw
    features: logits = features @ weight_.T + bias_; `lr_` (absolute), `weight_decay_`, and `held_out_accuracy_`, of
    the setting chosen (None where nothing could be held out).
    """

    def __init__(
        self,
        lr: Settings = (0.1, 0.3, 1, 3),
        weight_decay: Settings = (0.1, 0.01, 1e-3, 1e-4, 1e-5),
        epochs: int = 100,
        batch_size: int = 256,
        holdout: float = 0.2,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        self.lr, self.weight_decay = np.atleast_1d(lr).tolist(), np.atleast_1d(weight_decay).tolist()
        if not self.lr or min(self.lr) <= 0:
            raise ValueError(f"lr: expected numbers > 0, got {lr}")
        if not self.weight_decay or min(self.weight_decay) < 0:
            raise ValueError(f"weight_decay: expected numbers >= 0, got {weight_decay}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout: expected a share in (0, 1), got {holdout}")
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs, batch_size: expected at least 1, got {epochs}, {batch_size}")
        self.epochs, self.batch_size, self.holdout, self.seed, self.device = epochs, batch_size, holdout, seed, device

    def fit(self, features: Array, labels: Array) -> "LinearProbe":
        """Fit to training features `[N, F]` and integer labels `[N]` of at least two classes.

        Raises:
            ValueError: bad arrays, or labels of one class only.
        """
        device = self.device or (features.device if isinstance(features, torch.Tensor) else "cpu")
        rows = check_features("features", features)
        labels = check_labels("labels", labels, len(rows))
        self.classes_, positions = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"labels: a probe needs two classes, got only {self.classes_[0]}")
        x = _Standardised(rows, device)
        y = torch.from_numpy(positions).to(device)
        curvature = _largest_curvature(x[np.linspace(0, len(x) - 1, min(len(x), 4096)).astype(int)])
        settings = torch.tensor(list(product(self.lr, self.weight_decay)), dtype=torch.float32, device=device)
        settings[:, 0] /= curvature

        held = self._held_out(positions)
        chosen, self.held_out_accuracy_ = len(settings) // 2, None
        if held.any():
            heads = self._train(x, y, np.flatnonzero(~held), settings, SELECTION, MOST_CHOOSING)
            merits = _merits(heads, x, y, np.flatnonzero(held))
            chosen = merits.index(max(merits))
            self.held_out_accuracy_ = merits[chosen][0]
        self.lr_, self.weight_decay_ = settings[chosen].tolist()
        weight, bias = self._train(x, y, np.arange(len(x)), settings[chosen : chosen + 1], 1)
        self.weight_ = weight[0].cpu().double().numpy() / x.scale
        self.bias_ = bias[0].cpu().double().numpy() - self.weight_ @ x.mean
        return self

    def predict_proba(self, features: Array) -> Array:
        """Softmax probabilities `[N, K]` float32, columns in the order of `classes_`."""
        logits = self._logits(features)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return like((odds / odds.sum(axis=1, keepdims=True)).astype(np.float32), features)

    def predict(self, features: Array) -> Array:
        """The class with the largest logit, `[N]` int64."""
        return like(self.classes_[self._logits(features).argmax(axis=1)], features)

    def __str__(self) -> str:
        tried = len(self.lr) * len(self.weight_decay)
        how = "nothing could be held out to choose by" if self.held_out_accuracy_ is None else "best on held-out images"
        return f"cached: lr {self.lr_:.3g}, weight decay {self.weight_decay_:.3g}, of {tried} settings, {how}"

    def _logits(self, features: Array) -> np.ndarray:
        rows = check_features("features", features, width=self.weight_.shape[1])
        return np.concatenate([rows[block] @ self.weight_.T + self.bias_ for block in blocks(rows.shape)])

    def _held_out(self, positions: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng(self.seed)
        held = np.zeros(len(positions), dtype=bool)
        for position in range(len(self.classes_)):
            rows = generator.permutation(np.flatnonzero(positions == position))
            held[rows[: min(max(1, round(self.holdout * len(rows))), len(rows) - 1)]] = True  # one at least trains
        return held

    @torch.no_grad()
    def _train(
        self,
        x: "_Standardised",
        y: Tensor,
        rows: np.ndarray,
        settings: Tensor,
        share: float,
        most: float = np.inf,
    ) -> tuple[Tensor, Tensor]:
        """Weights `[S, K, F]` and biases `[S, K]` of S settings (lr, weight decay), trained on some rows of x."""
        heads, classes = len(settings), len(self.classes_)
        weight = torch.zeros(heads * classes, x.shape[1], device=y.device)
        bias = torch.zeros(heads * classes, device=y.device)
        speeds = torch.zeros_like(weight), torch.zeros_like(bias)
        lr, weight_decay = settings.repeat_interleave(classes, dim=0)[:, :, None].unbind(1)  # [S * K, 1] each
        per_epoch = -(-len(rows) // self.batch_size)
        steps = int(min(max(1, round(share * max(self.epochs * per_epoch, LEAST_STEPS))), most))
        order = np.empty(0, dtype=int)
        what = "linear probe" if heads == 1 else f"linear probe, choosing among {heads} settings"
        began = time.perf_counter()
        for step in tqdm(range(steps), desc=what, unit="step", leave=False, disable=None, delay=5):
            if step == TIMED:
                bias.sum().item()  # waits for a GPU
                left = (time.perf_counter() - began) / TIMED * (steps - TIMED)
                if left > LONG:
                    tqdm.write(f"{what}: expected time {duration(left)}", file=sys.stderr)
            place = step % per_epoch
            if place == 0:
                order = np.random.default_rng([self.seed, step]).permutation(rows)
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            images, target = x[batch], y[torch.from_numpy(batch).to(y.device)]
            # The gradient of cross-entropy by the logits is softmax minus one-hot.
            error = torch.addmm(bias, images, weight.T).view(len(batch), heads, classes).softmax(dim=2)
            error[torch.arange(len(batch)), :, target] -= 1
            error = error.view(len(batch), -1) / len(batch)
            annealed = 0.5 * (1 + np.cos(np.pi * step / steps))
            for speed, gradient, values, rate in (
                (speeds[0], torch.addcmul(error.T @ images, weight, weight_decay), weight, lr),
                (speeds[1], error.sum(dim=0), bias, lr[:, 0]),
            ):
                speed.mul_(MOMENTUM).add_(gradient)
                values.addcmul_(rate, speed, value=-annealed)
        return weight.view(heads, classes, -1), bias.view(heads, classes)


class _Standardised:
    """Rows of features with mean 0 and deviation 1, float32 on a device; memory-mapped ones are read when asked for."""

    def __init__(self, rows: np.ndarray, device: str | torch.device | None) -> None:
        self.shape, self.device = rows.shape, device
        self.mean = rows.mean(axis=0, dtype=np.float64)
        # numpy's own std would hold all deviations in float64 at once
        squares = sum(np.square(rows[block] - self.mean).sum(axis=0) for block in blocks(rows.shape))
        self.scale = np.sqrt(squares / len(rows))
        # a constant column but for float32's rounding, which is not to be blown up
        self.scale[self.scale <= np.finfo(np.float32).eps * np.abs(self.mean)] = 1
        self.rows, self.ready = rows, None
        if not isinstance(rows, np.memmap):
            ready = np.empty(rows.shape, np.float32)
            for block in blocks(rows.shape):
                ready[block] = (rows[block] - self.mean) / self.scale
            self.ready = torch.from_numpy(ready).to(device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """Rows by number (numpy int64)."""
        if self.ready is not None:
            return self.ready[torch.from_numpy(index).to(self.device)]
        block = (self.rows[index] - self.mean) / self.scale
        return torch.from_numpy(block.astype(np.float32)).to(self.device)


def _largest_curvature(x: Tensor) -> float:
    """Half of the largest eigenvalue of x'x / N, by power iteration: softmax cross-entropy's Hessian has no larger."""
    vector = torch.ones(x.shape[1], device=x.device)
    for _ in range(30):
        vector = x.T @ (x @ (vector / vector.norm().clamp(min=1e-12)))
    return max(0.5 * vector.norm().item() / len(x), 0.5)  # the bias's own is 0.5


def _merits(heads: tuple[Tensor, Tensor], x: _Standardised, y: Tensor, rows: np.ndarray) -> list[tuple[float, float]]:
    """(accuracy, -log loss) of every setting on some rows; a setting that diverged is worth least."""
    weight, bias = heads
    right, loss = torch.zeros(len(weight), device=y.device), torch.zeros(len(weight), device=y.device)
    for part in np.array_split(rows, -(-len(rows) // 1024)):
        target = y[torch.from_numpy(part).to(y.device)][:, None].expand(-1, len(weight))  # [n, S]
        logits = torch.einsum("nf,skf->nks", x[part], weight) + bias.T
        right += (logits.argmax(dim=1) == target).sum(dim=0)
        loss += cross_entropy(logits, target, reduction="none").sum(dim=0)
    loss = loss.nan_to_num(nan=torch.inf)
    right[loss == torch.inf] = -1
    return list(zip((right / len(rows)).tolist(), (-loss / len(rows)).tolist(), strict=True))
