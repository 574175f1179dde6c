"""Who teaches: another run's network, frozen, or the student's own moving average."""

from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.ssl.config import Config, DistillConfig
from gradmix.ssl.data.images import Constants
from gradmix.ssl.networks.backbones import Encoder, load_backbone, read_backbone
from gradmix.ssl.networks.heads import read_head
from gradmix.ssl.networks.layout import layout_of
from gradmix.ssl.objective import Taught, losses_in
from gradmix.ssl.runs.files import hash_file, hash_json
from gradmix.ssl.runs.folder import read_config
from gradmix.ssl.runs.tensors import read_header
from gradmix.ssl.targets import OrthogonalTargetLoss


class Teacher(nn.Module):
    """A network that is only asked: evaluation mode, no gradients, and no parameters, for its weights are buffers.

    So no optimizer, weight decay or reducer of gradients sees them, and a step that is left out puts them back.

    Args:
        backbone: of normalised images.
        head: of its features; None where only the features are followed.
        targets: the class targets it was trained with, if any.
        temperature: of its logits; None: the step's.
        momentum: of the moving average; None for a frozen teacher, whose weights are in no checkpoint.
        constants: what the student's normalisation removes from images, mean and deviation by channel.
        hash: SHA-256 of a frozen teacher's weights.
    """

    def __init__(
        self,
        backbone: Encoder,
        head: nn.Module | None,
        targets: OrthogonalTargetLoss | None = None,
        temperature: float | None = None,
        momentum: float | None = None,
        constants: Constants | None = None,
        hash: str | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.targets = backbone, head, targets
        self.temperature, self.momentum, self.hash = temperature, momentum, hash
        for part in self.modules():
            weights = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
            for name, tensor in weights.items():
                part._parameters.pop(name, None)
                part.register_buffer(name, tensor.detach(), persistent=momentum is not None)
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale = shift = None  # from the student's normalisation to its own, where they differ
        if constants is not None and constants != backbone.constants:
            (mean, std), (own_mean, own_std) = (torch.tensor(pair) for pair in (constants, backbone.constants))
            scale, shift = (std / own_std)[:, None, None], ((mean - own_mean) / own_std)[:, None, None]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        """Always evaluation mode: a teacher's statistics are not the batch's."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Tensor, temperature: float) -> Taught:
        """
        Args:
            views: ``[N, 3, S, S]``, normalised for the student.
            temperature: of this step.
        """
        if self.scale is not None and self.shift is not None:
            views = views * self.scale + self.shift
        features = self.backbone(views)
        z = None if self.head is None else F.normalize(self.head(features).float(), dim=1)
        logits = None
        if z is not None and self.targets is not None:
            logits = self.targets.logits(z, self.temperature or temperature)
        return Taught(F.normalize(features.float(), dim=1), z, logits)

    @torch.no_grad()
    def follow(self, backbone: nn.Module, head: nn.Module, step: int) -> None:
        """Move the average towards the student, statistics included; a frozen teacher stays.

        Args:
            step: optimizer steps that the student has done. Early, the average is over all of them, so that the first
                weights do not linger: momentum min(m, step / (step + 1)), as in Mean Teacher (arXiv 1703.01780).
        """
        if self.momentum is None:
            return
        weight = 1 - min(self.momentum, step / (step + 1))
        for ours, theirs in ((self.backbone, backbone), (self.head, head)):
            if ours is None:
                continue
            now = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
            for name, average in ours.named_buffers():
                if average.is_floating_point():
                    average.lerp_(now[name].to(average.dtype), weight)
                else:
                    average.copy_(now[name])


def check_teacher(config: Config, classes: list[str] | None = None) -> None:
    """
    Args:
        classes: of the training images, once they are known.

    Raises:
        ValueError: no such teacher, or one that can't teach what ``distill.form`` asks for.
    """
    distill = config.distill
    if distill.name == "none":
        return
    if config.trainer.get("sync_batchnorm"):
        raise ValueError(
            f"trainer.sync_batchnorm: not with distill={distill.name}, whose teacher it would take for a part of what "
            "is trained; leave one of the two out"
        )
    if distill.form == "logits" and not config.method.targets:
        raise ValueError(
            f"distill.form: logits are those of class targets (method=sphor), which method={config.method.name} has "
            "not; distill.form=relations needs no classes"
        )
    if distill.name == "ema":
        if distill.teacher is not None:
            raise ValueError("distill.teacher: distill=ema follows the student's own average; distill=run takes a run")
        return
    if distill.teacher is None:
        raise ValueError("distill.teacher: missing; distill=run needs distill.teacher=DIR, another run's folder")
    run = teacher_run(config)
    if distill.form == "relations" and distill.space == "features":
        return
    what = "distill.form=logits" if distill.form == "logits" else "distill.space=projections"
    if run is None or not (run / "head.safetensors").is_file():
        raise ValueError(f"distill.teacher: {distill.teacher} has no head.safetensors, which {what} needs")
    if distill.form == "relations":
        return
    method = read_config(run).method
    if not method.targets:
        has = " and ".join(losses_in(method))
        raise ValueError(f"distill.teacher: {run} was trained with {has}, not with class targets, which {what} needs")
    theirs = read_header(run / "backbone.safetensors").classes
    if classes is not None and theirs != classes:
        named = "none" if theirs is None else ", ".join(theirs[:10])
        raise ValueError(
            f"distill.teacher: {run} has the classes {named}, the student {', '.join(classes[:10])}; {what} needs the "
            "same in the same order, distill.form=relations does not"
        )


def teacher_run(config: Config) -> Path | None:
    """The folder of the run that teaches; of a run over all splits, that of this split. None for a file.

    Raises:
        ValueError: nothing there to read.
    """
    assert config.distill.teacher is not None
    path = Path(config.distill.teacher).expanduser()
    if path.is_file():
        return None
    for run in (path, path / f"split-{config.data.split}"):
        if (run / "backbone.safetensors").is_file():
            return run
    raise ValueError(f"distill.teacher: {path} is no weights file, and no finished run's folder (backbone.safetensors)")


def build_teacher(
    config: Config, backbone: Encoder, head: nn.Module, targets: OrthogonalTargetLoss | None, image_size: int
) -> Teacher | None:
    """The teacher that a config asks for; None for ``distill=none``.

    Args:
        backbone, head, targets: the student's, freshly made.
        image_size: side of the views.

    Raises:
        ValueError: weights that can't be read, or of another image size.
    """
    distill = config.distill
    if distill.name == "none":
        return None
    if distill.name == "ema":
        return Teacher(deepcopy(backbone), deepcopy(head), deepcopy(targets), momentum=distill.momentum)
    frozen, own_head, own_targets, temperature, digest = _read(config, distill, targets, image_size)
    frozen.to(memory_format=layout_of(frozen, config.speed.channels_last))
    return Teacher(frozen, own_head, own_targets, temperature, constants=backbone.constants, hash=digest)


def _read(
    config: Config, distill: DistillConfig, targets: OrthogonalTargetLoss | None, image_size: int
) -> tuple[Encoder, nn.Module | None, OrthogonalTargetLoss | None, float | None, str]:
    run = teacher_run(config)
    if run is None:
        path = Path(str(distill.teacher)).expanduser()
        encoder = read_backbone(path, distill.encoder or config.encoder.name, image_size=image_size)
        return encoder, None, None, None, hash_file(path)
    loaded = load_backbone(run)
    if loaded.image_size != image_size:
        raise ValueError(
            f"distill.teacher: {run} was trained on {loaded.image_size} x {loaded.image_size} pixels, the views have "
            f"{image_size}; data.image_size={loaded.image_size} makes them alike"
        )
    files = [run / "backbone.safetensors"]
    if distill.form == "relations" and distill.space == "features":
        return loaded.encoder, None, None, None, hash_file(files[0])
    files.append(run / "head.safetensors")
    head = read_head(files[1], loaded.num_features)
    digest = hash_json({path.name: hash_file(path) for path in files})
    if distill.form == "relations":
        return loaded.encoder, head, None, None, digest
    method, dim = read_config(run).method, cast(nn.Linear, head[-1]).out_features
    assert targets is not None  # check_teacher has seen to it
    temperature = method.temperature if method.temperature_end is None else method.temperature_end
    return loaded.encoder, head, OrthogonalTargetLoss(len(targets.targets), dim), temperature, digest
