"""GradMix and the mixers it is compared with: one contract, whole batches, no per-image loop, no host copy.

A batch holds two views of each of B images, view-major: view v of image i is row ``v * B + i`` of ``[2B, C, H, W]``.
A mixer gives every row a partner, the *other* view of *another* image, and says which fraction of the row's own
pixels it kept. GradMix: arXiv 2505.12803.

On a GPU nothing here waits for the device. Two habits keep it so: no ``torch.where`` with a Python number (it becomes
a tensor on the host, whose copy to the device waits), and sizes multiplied as numbers, not as tensors.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gradmix.attribution import EVIDENCE, default_layers, layercam, record, still
from gradmix.boxes import boxes_inside, kept_fraction, paste, resize_into
from gradmix.draws import beta, noise_like, normal, random_pixels, uniform
from gradmix.registry import Registry

PASTE = ("resize", "cut", "noise")
CENTRE = ("peak", "random")
PARTNER = ("random", "similar", "dissimilar")


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        images: ``[2B, C, H, W]``, dtype and memory format of the input.
        kept: ``[2B]`` float32: fraction of each row's own pixels that are still there (its share, for blends).
        partner: ``[2B]`` int64: the row that was mixed in; the row itself where none was.
        attribution: ``[2B, H, W]`` in [0, 1], or None for mixers that do not look.
        boxes: ``[2B, 4]`` int64 (top, left, bottom, right; ends exclusive), or None for mixers without boxes.
    """

    images: Tensor
    kept: Tensor
    partner: Tensor
    attribution: Tensor | None = None
    boxes: Tensor | None = None


class Mixer:
    """What all mixers share: checks, partners, and where random numbers come from. A mixer implements `_mix`.

    Args:
        partner: ``"random"``, or the most ``"similar"`` or ``"dissimilar"`` other image, measured on the
            ``projections`` given in the call.
    """

    def __init__(self, partner: str = "random"):
        self.partner = _one_of("partner", partner, PARTNER)
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        loss: Tensor | None = None,
        generator: torch.Generator | None = None,
        projections: Tensor | None = None,
        attribution: Tensor | None = None,
    ) -> Mixed:
        """Mix a batch of two views.

        Args:
            images: ``[2B, C, H, W]``, floating point, view-major. Not changed.
            loss: the scalar whose gradient guides the mixing; only GradMix uses it, before ``backward()``.
            generator: source of all randomness, on the device of ``images`` (one on the CPU works too, at the
                price of a copy). Without one a private generator is used, seeded from ``torch.initial_seed()``;
                the global RNG is never touched.
            projections: ``[2B, D]``, L2-normalised; only for ``partner="similar" | "dissimilar"``.
            attribution: ``[2B, H, W]``, non-negative: maps to follow instead of the loss's; only GradMix uses them.

        A batch of one image has no partner: images come back as they are, with ``kept`` = 1.

        Raises:
            ValueError: ``images`` not of that form, or something the mixer needs is missing.
        """
        if images.ndim != 4 or images.shape[0] % 2 or not images.numel() or not images.is_floating_point():
            raise ValueError(f"images: expected float [2B, C, H, W], got {images.dtype} {tuple(images.shape)}")
        rows, device = images.shape[0], images.device
        if rows == 2:
            return Mixed(images, torch.ones(2, device=device), torch.arange(2, device=device))
        generator = generator or self._private_generator(device)
        partner = self._partners(rows, device, generator, projections)
        if attribution is None:
            attribution = self.attribute(images, loss)
        elif attribution.shape != (rows, *images.shape[2:]):
            expected = (rows, *images.shape[2:])
            raise ValueError(f"attribution: expected {expected}, got {tuple(attribution.shape)}")
        mixed = self._mix(images, partner, attribution, generator)
        if images.is_contiguous(memory_format=torch.channels_last):
            mixed = replace(mixed, images=mixed.images.contiguous(memory_format=torch.channels_last))
        return mixed

    def attribute(self, images: Tensor, loss: Tensor | None) -> Tensor | None:
        """The maps that the mixing follows, ``[2B, H, W]``; None for mixers that do not look."""
        return None

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        """Mix checked images with the rows ``partner`` ``[2B]``; all randomness from ``generator``."""
        raise NotImplementedError

    def _private_generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(torch.initial_seed())
        return self._generators[device]

    def _partners(
        self, rows: int, device: torch.device, generator: torch.Generator, projections: Tensor | None
    ) -> Tensor:
        """For each row the row of the other view of another image, ``[2B]`` int64."""
        batch = rows // 2
        row = torch.arange(rows, device=device)
        image, other_view = row % batch, 1 - row // batch
        if self.partner == "random":
            step = torch.randint(1, batch, (rows,), generator=generator, device=generator.device)
            return other_view * batch + (image + step.to(device, non_blocking=True)) % batch
        if projections is None or projections.ndim != 2 or projections.shape[0] != rows:
            got = None if projections is None else tuple(projections.shape)
            raise ValueError(f"projections: partner={self.partner!r} needs [{rows}, D] in the call, got {got}")
        with torch.autocast(device.type, enabled=False):  # half precision would make ties
            similarity = projections.float() @ projections.float().T
        if self.partner == "dissimilar":
            similarity = -similarity
        allowed = (image[:, None] != image) & (other_view[:, None] != other_view)
        return similarity.masked_fill(~allowed, -torch.inf).argmax(1)


class GradMix(Mixer):
    """Hides what the network relies on: a box around the peak of each image's attribution map is filled.

    Use::

        mixer = GradMix()
        with mixer.watch(encoder):                # records the stages' outputs in this forward pass
            z = normalize(head(encoder(views)))   # views [2B, C, H, W]
        loss = ntxent(z)
        mixed = mixer(views, loss)                # before backward(); no second forward, no .grad touched
        p = normalize(head(encoder(mixed.images)))
        (loss + ntxent(z, positives=p, weight=mixed.kept)).backward()

    Args:
        layers: names of the submodules whose outputs are attributed, ``[N, C, h, w]`` or tokens ``[N, T, C]``, or
            how many of the last stages of a known family (ResNet, ConvNeXt, ViT).
        alpha: the keep-ratio is Beta(alpha, alpha), drawn per image and mapped to ``keep``.
        keep: smallest and largest share of pixels kept, before rounding to whole pixels.
        paste: what fills the box: the partner ``"resize"``d into it whole, the partner ``"cut"`` at the same
            place, or Gaussian ``"noise"`` with the image's own mean and deviation per channel.
        evidence: see :func:`gradmix.layercam`.
        centre: ``"peak"`` of the map, or ``"random"``: the control that boxes without looking (no loss needed).
        partner: see :class:`Mixer`.
    """

    def __init__(
        self,
        layers: Sequence[str] | int = 3,
        alpha: float = 1.0,
        keep: tuple[float, float] = (0.5, 0.9),
        paste: str = "resize",
        evidence: str = "loss",
        centre: str = "peak",
        partner: str = "random",
    ):
        super().__init__(partner)
        if isinstance(layers, str) or (layers < 1 if isinstance(layers, int) else not list(layers)):
            raise ValueError(f"layers: expected a list of names or how many of the last stages, got {layers!r}")
        self.layers = layers
        self.alpha = _positive("alpha", alpha)
        self.keep = _range("keep", keep)
        self.paste = _one_of("paste", paste, PASTE)
        self.evidence = _one_of("evidence", evidence, EVIDENCE)
        self.centre = _one_of("centre", centre, CENTRE)
        self._activations: list[Tensor] = []
        self._watched: nn.Module = nn.Module()

    def watch(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context manager: the forward pass of ``module`` inside it is the one that is attributed.

        Args:
            module: the encoder, or any module that it is a part of. Both views go through it in one call.

        Raises:
            ValueError: a layer that ``module`` does not have, or no default for it; the message lists the choices.
        """
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module  # so that layers are named as without it
        layers = self.layers_in(module)
        self._activations.clear()
        self._watched = module
        return record(module, layers, self._activations)

    def layers_in(self, module: nn.Module) -> list[str]:
        """Names of the submodules that :meth:`watch` looks at.

        Raises:
            ValueError: there is no default for ``module``; the message lists the choices.
        """
        return default_layers(module, self.layers) if isinstance(self.layers, int) else list(self.layers)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        centres = random_pixels(rows, (height, width), images.device, generator)
        if attribution is not None:
            highest, peak = attribution.flatten(1).max(1)
            peaks = torch.stack([peak // width, peak % width], 1)
            centres = torch.where(highest[:, None] > 0, peaks, centres)
        low, high = self.keep
        lam = low + (high - low) * beta(rows, self.alpha, images.device, generator)
        boxes = boxes_inside(centres, (1 - lam).sqrt(), (height, width))
        if self.paste == "noise":
            partner = torch.arange(rows, device=images.device)
            filling = noise_like(images, generator)
        elif self.paste == "cut":
            filling = images[partner]
        else:
            filling = resize_into(images[partner], boxes)
        return Mixed(paste(images, filling, boxes), kept_fraction(boxes, (height, width)), partner, attribution, boxes)

    def attribute(self, images: Tensor, loss: Tensor | None) -> Tensor | None:
        """LayerCAM maps ``[N, H, W]`` in [0, 1] of the watched forward pass of ``images`` ``[N, C, H, W]``.

        What a call does by itself. By hand, where a batch goes through the network in parts: attribute each of them,
        then call with ``attribution=torch.cat(maps)``.

        Raises:
            ValueError: no loss, or no forward pass of these images was watched.
        """
        if self.centre == "random":
            return None
        if loss is None:
            raise ValueError("loss: GradMix needs the contrastive loss of the watched forward pass")
        if not self._activations:
            raise ValueError("loss: no forward pass was recorded; run the encoder inside `with mixer.watch(encoder):`")
        activations = tuple(self._activations)
        self._activations.clear()  # they hold the step's graph
        if activations[0].shape[0] != images.shape[0]:
            raise ValueError(
                f"images: {images.shape[0]} rows, but the watched forward pass had {activations[0].shape[0]}; "
                "both views go through the network in one call"
            )
        with still(self._watched):
            return layercam(loss, activations, tuple(images.shape[2:]), self.evidence)


class CutMix(Mixer):
    """A box at a uniformly random place is cut from the partner (arXiv 1905.04899), per-image lam ~ Beta(alpha, alpha).

    The box is clipped at the border, as in the paper; ``kept`` counts the pixels after clipping.
    """

    def __init__(self, alpha: float = 1.0, partner: str = "random"):
        super().__init__(partner)
        self.alpha = _positive("alpha", alpha)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        share = (1 - beta(rows, self.alpha, images.device, generator)).sqrt()
        centres = random_pixels(rows, (height, width), images.device, generator)
        sides = torch.stack([share * height, share * width], 1).long()
        start = centres - sides // 2
        bottom, right = (start + sides).unbind(1)
        end = torch.stack([bottom.clamp(max=height), right.clamp(max=width)], 1)
        boxes = torch.cat([start.clamp(min=0), end], 1)
        kept = kept_fraction(boxes, (height, width))
        return Mixed(paste(images, images[partner], boxes), kept, partner, boxes=boxes)


class ResizeMix(Mixer):
    """The whole partner, shrunk to a random share of the sides, at a random place (arXiv 2012.11101).

    Args:
        scale: smallest and largest share of the image's sides that the pasted partner takes.
    """

    def __init__(self, scale: tuple[float, float] = (0.1, 0.8), partner: str = "random"):
        super().__init__(partner)
        self.scale = _range("scale", scale)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        low, high = self.scale
        share = low + (high - low) * uniform((rows,), images.device, generator)
        sides = torch.stack([share * height, share * width], 1).round()
        room = torch.stack([height - sides[:, 0], width - sides[:, 1]], 1) + 1
        start = (uniform((rows, 2), images.device, generator) * room).long()
        boxes = torch.cat([start, start + sides.long()], 1)
        filling = resize_into(images[partner], boxes)
        return Mixed(paste(images, filling, boxes), kept_fraction(boxes, (height, width)), partner, boxes=boxes)


class MixUp(Mixer):
    """Each image is blended with its partner (arXiv 1710.09412); ``kept`` is its share lam ~ Beta(alpha, alpha)."""

    def __init__(self, alpha: float = 1.0, partner: str = "random"):
        super().__init__(partner)
        self.alpha = _positive("alpha", alpha)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        lam = beta(images.shape[0], self.alpha, images.device, generator).to(images.dtype)  # as the blend has it
        return Mixed(torch.lerp(images[partner], images, lam[:, None, None, None]), lam.float(), partner)


class FMix(Mixer):
    """A mask thresholded from low-frequency noise decides pixel by pixel (arXiv 2002.12047).

    Args:
        alpha: lam ~ Beta(alpha, alpha) per image is the share of pixels kept.
        decay: power with which the noise's spectrum falls; larger gives larger blobs.
    """

    def __init__(self, alpha: float = 1.0, decay: float = 3.0, partner: str = "random"):
        super().__init__(partner)
        self.alpha = _positive("alpha", alpha)
        self.decay = _positive("decay", decay)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        device = images.device
        frequency = torch.hypot(
            torch.fft.fftfreq(height, device=device)[:, None], torch.fft.rfftfreq(width, device=device)
        ).clamp(min=1 / max(height, width))
        spectrum = torch.view_as_complex(normal((rows, *frequency.shape, 2), device, generator))
        noise = torch.fft.irfft2(spectrum / frequency**self.decay, s=(height, width))
        keep = (beta(rows, self.alpha, device, generator) * height * width).round()  # pixels
        rank = noise.flatten(1).argsort(1, descending=True).argsort(1).view_as(noise)
        mask = (rank < keep[:, None, None])[:, None]
        return Mixed(torch.where(mask, images, images[partner]), keep / (height * width), partner)


MIXERS: Registry[Callable[..., Mixer]] = Registry(
    "gradmix.mixers",
    {
        "gradmix": GradMix,
        "random_box": partial(GradMix, centre="random"),
        "noise_box": partial(GradMix, paste="noise"),
        "cutmix": CutMix,
        "mixup": MixUp,
        "resizemix": ResizeMix,
        "fmix": FMix,
    },
)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def _range(name: str, value: Sequence[float]) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"{name}: expected (low, high) with 0 <= low <= high <= 1, got {value!r}")
    return float(value[0]), float(value[1])
