"""Weights trained elsewhere: read without running what the file holds, and found by name and shape, heads dropped."""

import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch puts them inside names
CODE_KEYS = ("_target_", "_instantiator")  # Hydra's and Lightning's names for "import this and call it"
# How others name torchvision's parts: of the network itself, and inside its blocks.
STYLES: tuple[tuple[dict[str, str], dict[str, str]], ...] = (
    ({}, {}),  # torchvision, timm, MoCo, solo-learn
    ({}, {"downsample": "shortcut"}),  # SupContrast, lightly's own ResNets
    # lightly's examples: nn.Sequential of torchvision's children
    ({"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}, {}),
)


@dataclass(frozen=True)
class Found:
    """A backbone's tensors among a file's.

    Attributes:
        tensors: by the backbone's own names.
        missing: the backbone's names that the file lacks.
        unused: the file's names that were dropped.
        prefix: what stands before the names in the file.
        others: prefixes under which as many of the names exist, such as a momentum encoder's.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unused: list[str]
    prefix: str
    others: list[str]

    def __str__(self) -> str:
        counts = f"{len(self.tensors)} tensors matched under {self.prefix!r}"
        others = f" (also there: {', '.join(map(repr, self.others))})" if self.others else ""
        return f"{counts}{others}; missing: {_some(self.missing)}; unused: {_some(self.unused)}"


def load_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file or a torch checkpoint, by its name; nested dicts joined with dots.

    A torch checkpoint is a pickle, which can ask for any code to run. It is read by torch's ``weights_only`` loader,
    which knows tensors, plain containers and numbers; SupContrast's ``argparse.Namespace`` is let in beside them.

    Raises:
        ValueError: missing, damaged, a pickle with anything else in it (never executed), or no tensor.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
        else:
            _check_zip(path)
            with torch.serialization.safe_globals([Namespace]):
                weights = dict(_tensors(torch.load(path, map_location="cpu", weights_only=True)))
    except MemoryError:
        raise ValueError(f"{path}: does not fit in memory") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable weights file ({error})") from error
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), None)
        reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
        reason = reason.split(". Please use")[0]  # to trust the file, which is the one thing not to do
        hint = "only plain weights are read: save the state_dict alone, or as .safetensors"
        raise ValueError(f"{path}: not a readable weights file ({reason[:300]}); {hint}") from error
    if not weights:
        raise ValueError(f"{path}: holds no weights")
    return weights


def find_backbone(weights: dict[str, Tensor], names: Sequence[str]) -> Found:
    """The prefix and naming style under which most of ``names`` exist; the first in the file among equals."""
    weights = {_unwrapped(name): tensor for name, tensor in weights.items()}
    best: tuple[str, dict[str, str]] = ("", {})
    others: list[str] = []
    for outer, inner in STYLES:
        theirs = {_renamed(name, outer, inner): name for name in names}
        found: dict[str, dict[str, str]] = {}  # prefix: {name in the file: ours}
        for full in weights:
            parts = full.split(".")
            for start in range(len(parts)):
                ours = theirs.get(".".join(parts[start:]))
                if ours is not None:
                    found.setdefault("".join(part + "." for part in parts[:start]), {})[full] = ours
        for prefix, matched in found.items():
            if len(matched) > len(best[1]):
                best, others = (prefix, matched), []
            elif len(matched) == len(best[1]) and prefix != best[0]:
                others.append(prefix)
    prefix, matched = best
    tensors = {ours: weights[full] for full, ours in matched.items()}
    missing = [name for name in names if name not in tensors]
    return Found(tensors, missing, [name for name in weights if name not in matched], prefix, others)


def load_found(module: nn.Module, found: Found, path: Path, settings: str) -> None:
    """Load ``found`` into ``module``; only BatchNorm's step counters, which change nothing, may be missing.

    Args:
        settings: keys that decide on names and shapes, for the message.

    Raises:
        ValueError: too few tensors match in name and shape; says how many do, and which do not.
    """
    expected = module.state_dict()
    wrong = [name for name, tensor in found.tensors.items() if tensor.shape != expected[name].shape]
    missing = [name for name in found.missing if not name.endswith("num_batches_tracked")]
    if missing or wrong:
        shapes = [f"{name} {list(found.tensors[name].shape)} for {list(expected[name].shape)}" for name in wrong]
        reasons = [f"missing: {_some(missing)}"] * bool(missing) + [f"other shape: {_some(shapes)}"] * bool(wrong)
        fitting = len(found.tensors) - len(wrong)
        raise ValueError(
            f"{path}: only {fitting} of the encoder's {len(expected)} tensors match; {'; '.join(reasons)}; "
            f"choose the {settings} it was trained with"
        )
    module.load_state_dict(found.tensors, strict=False)


def _check_zip(path: Path) -> None:
    """torch writes its archives uncompressed: one that unpacks to more than the file holds is a bomb."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"its {path.stat().st_size} bytes would unpack to {unpacked}")


def _tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, in the file's order. Refuses what asks for code, though nothing here would run it."""
    stack, seen = [("", tree)], set()
    while stack:
        name, value = stack.pop()
        if type(value) in (Tensor, nn.Parameter):
            if value.layout == torch.strided and not value.is_meta and not value.is_quantized:
                yield name, value.detach()
            continue
        value = vars(value) if isinstance(value, Namespace) else value
        if not isinstance(value, dict | list | tuple) or id(value) in seen:  # a pickle can hold itself
            continue
        seen.add(id(value))
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, _ in items:
            if key in CODE_KEYS:
                raise ValueError(f"Unsupported: {name + '.' if name else ''}{key} names code to run")
        stack += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(items)]


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _renamed(name: str, outer: dict[str, str], inner: dict[str, str]) -> str:
    first, *rest = name.split(".")
    return ".".join([outer.get(first, first), *(inner.get(part, part) for part in rest)])


def _some(names: Sequence[str], count: int = 6) -> str:
    shown = ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")
    return shown or "none"
