"""A run's projection head, read without the library that training builds it with."""

from pathlib import Path

from torch import nn

from gradmix.ssl.networks.weights import load_weights


def read_head(path: Path, num_features: int) -> nn.Sequential:
    """What a run has in ``head.safetensors``: features ``[N, F]`` to projections ``[N, D]``, not normalised.

    Args:
        num_features: F, of its backbone.

    Raises:
        ValueError: damaged, or not the head of such a backbone.
    """
    weights = {name.removeprefix("layers."): value for name, value in load_weights(path).items()}
    try:
        width, out = len(weights["0.weight"]), len(weights["2.weight"])
        head = nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, out))
        head.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not the projection head of its backbone ({str(error).splitlines()[0]})") from error
    return head
