"""GradMix (arXiv 2505.12803): the box lies where the gradient of the loss says that the network looks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from gradmix.attribution import EVIDENCE, default_layers, layercam, record, still
from gradmix.boxes import boxes_inside, inside_rim, kept_fraction, paste, resize_into, shift_into
from gradmix.draws import beta, noise_like, random_pixels, uniform
from gradmix.mixer import Mixed, Mixer, one_of, positive, share_range

PASTE = ("resize", "cut", "noise", "background")
CENTRE = ("peak", "random")


class GradMix(Mixer):
    """Covers a box around the peak of each image's attribution map: by default, where more activation raises the loss.

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
            place, or Gaussian ``"noise"`` with the image's own mean and deviation per channel. With
            ``"background"`` it is the other way round, after BackMix (arXiv 2503.17717): the box lies around a random
            pixel of the half where the map is lowest, and is filled with as large a piece of the partner from around
            such a pixel of its own.
        evidence: see :func:`gradmix.layercam`.
        border: the share of each side of the map, 0 to below 0.5, where no peak is looked for. Trained with mixing,
            most peaks lie at the border, and boxes there hide little.
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
        border: float = 0.0,
    ):
        super().__init__(partner)
        if isinstance(layers, str) or (layers < 1 if isinstance(layers, int) else not list(layers)):
            raise ValueError(f"layers: expected a list of names or how many of the last stages, got {layers!r}")
        self.layers = layers
        self.alpha = positive("alpha", alpha)
        self.keep = share_range("keep", keep)
        self.paste = one_of("paste", paste, PASTE)
        self.evidence = one_of("evidence", evidence, EVIDENCE)
        self.centre = one_of("centre", centre, CENTRE)
        if paste == "background" and centre != "peak":
            raise ValueError("paste: 'background' asks the map where the background is; it needs centre='peak'")
        if not 0 <= border < 0.5:
            raise ValueError(f"border: expected 0 to below 0.5, got {border!r}")
        self.border = float(border)
        self._activations: list[Tensor] = []
        self._watched: nn.Module = nn.Module()

    @property
    def looks(self) -> bool:
        """Whether the box is centred on the map's peak."""
        return self.centre == "peak"

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
            inner = inside_rim(attribution, self.border) if self.border else attribution
            highest, peak = inner.flatten(1).max(1)
            if self.paste == "background":
                rank = uniform((rows, 1), images.device, generator) * ((height * width + 1) // 2)
                peak = attribution.flatten(1).argsort(1).gather(1, rank.long())[:, 0]
            peaks = torch.stack([peak // width, peak % width], 1)
            centres = torch.where(highest[:, None] > 0, peaks, centres)
        low, high = self.keep
        lam = low + (high - low) * beta(rows, self.alpha, images.device, generator)
        boxes = boxes_inside(centres, (1 - lam).sqrt(), (height, width))
        if self.paste == "noise":
            partner = torch.arange(rows, device=images.device)
            filling = noise_like(images, generator)
        elif self.paste == "background":
            of_partner = boxes_inside(centres[partner], (1 - lam).sqrt(), (height, width))
            filling = shift_into(images[partner], of_partner, boxes)
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
        if not self.looks:
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
            return layercam(loss, activations, (images.shape[2], images.shape[3]), self.evidence)
