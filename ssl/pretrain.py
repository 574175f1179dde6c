"""The training step: two views, contrastive loss, attribution on the same graph, mixed views, one backward pass."""

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F
from lightly.models.modules.heads import ProjectionHead
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmix.attribution import find_stages, still
from gradmix.mixing import MIXERS, GradMix, Mixed, Mixer
from gradmix.registry import nearest
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import Config, MethodConfig, MixConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import Batch, TrainLoader, seed_of
from gradmix.ssl.data.views import Crops
from gradmix.ssl.losses import NTXentLoss, SupConLoss
from gradmix.ssl.machine import decoders, precision
from gradmix.ssl.networks.backbones import build_backbone
from gradmix.ssl.networks.layout import layout_of
from gradmix.ssl.targets import OrthogonalTargetLoss

OPTIMIZERS = ("adam", "adamw", "sgd", "lars")


class Pretraining(LightningModule):
    """SimCLR, SupCon, class targets or several of them on ``train``, with or without mixing.

    Args:
        config: the whole run's configuration.
        train: training images; labels are used by ``supervised`` and ``targets`` only.

    Attributes:
        start: steps that were done already when this session began.
        steps: steps done, over all epochs and sessions.
        scalars: what the last step has to report, on the device; reading them makes a GPU wait.
        pictures: the last views and what became of them.
    """

    def __init__(self, config: Config, train: ImageSet):
        super().__init__()
        method = config.method
        if not any(weights_of(method).values()):
            raise ValueError("method: supervised, selfsup and targets are all 0, nothing would be learned")
        if (method.supervised or method.targets) and (train.labels < 0).any():
            raise ValueError(f"method: {method.name} needs classes, but data.root has none; use method=simclr")
        self.config, self.train_set = config, train
        self.start = self.steps = 0
        self.mixer = build_mixer(config.mix)
        if self.mixer is not None:
            check_mixing(method)
        self.looks = isinstance(self.mixer, GradMix) and self.mixer.centre == "peak"  # at the gradient
        backbone = build_backbone(config.encoder, config.data.image_size)
        self.layout = layout_of(backbone, config.speed.channels_last)
        self.backbone = backbone.to(memory_format=self.layout)
        watched = self.mixer.layers_in(self.backbone) if self.looks else []
        if config.speed.compile:
            compile_stages(self.backbone, watched)
        features = self.backbone.num_features
        self.head = ProjectionHead(
            [(features, features, None, nn.ReLU()), (features, config.encoder.head_dim, None, None)]
        )
        self.augment = TwoViews(config.data.augment, config.data.image_size, constants=self.backbone.constants)
        self.selfsup_loss = NTXentLoss(method.temperature)
        self.supervised_loss = SupConLoss(method.temperature)
        self.target_loss = build_target_loss(config, train) if method.targets else None
        self.scalars: dict[str, Tensor] = {}
        self.pictures: tuple[Tensor, Mixed] | None = None

    def project(self, views: Tensor) -> Tensor:
        """Views ``[N, 3, S, S]`` to projections ``[N, D]``, in micro-batches if the config has them.

        A micro-batch keeps nothing but its projections, and is computed again in the backward pass: gradient caching
        (arXiv 2101.06983). BatchNorm sees each micro-batch by itself, and counts it once.
        """
        size = self.config.speed.micro_batch
        if size is None:
            return self._project(views)
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), still(self.backbone))}
        return torch.cat([checkpoint(self._project, part, **again) for part in views.split(size)])

    def _project(self, views: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(views)).float(), dim=1)

    def attribute_in_parts(self, views: Tensor, z: Tensor, guide: Tensor) -> Tensor:
        """The maps ``[2B, H, W]`` of ``guide``: its gradient at ``z``, handed on through one micro-batch at a time."""
        (gradient,) = torch.autograd.grad(guide, z, retain_graph=True)
        size = self.config.speed.micro_batch
        maps = []
        for part, its_gradient in zip(views.split(size), gradient.split(size), strict=True):
            with still(self.backbone), self.mixer.watch(self.backbone):
                its_z = self._project(part)
            maps.append(self.mixer.attribute(part, (its_z * its_gradient).sum()))
        return torch.cat(maps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        method, mix = self.config.method, self.config.mix
        mixing = self.mixer is not None and mixes_at(mix, self.config.seed, batch.epoch, batch.step)
        looks = mixing and self.looks
        looking = looks and batch.step % mix.attribution_every == 0
        seed = seed_of(self.config.seed, batch.epoch, batch.step, self.global_rank)
        in_parts = self.config.speed.micro_batch is not None
        torch.manual_seed(seed)  # what a network drops at random, too, is a function of the step

        views = self.augment(batch.images, seed).contiguous(memory_format=self.layout)  # [2B, 3, H, W]
        labels = batch.labels.repeat(2)  # [2B]
        with self.mixer.watch(self.backbone) if looking and not in_parts else nullcontext():
            z = self.project(views)  # [2B, D]

        done = (batch.epoch + batch.step / self.loader.steps_per_epoch) / self.config.epochs
        self.selfsup_loss.temperature = self.supervised_loss.temperature = temperature_at(method, done)
        losses = {}
        if method.supervised:
            losses["supervised"] = self.supervised_loss(z, labels)
        if self.needs_selfsup:
            losses["selfsup"] = self.selfsup_loss(z)
        if method.targets:
            self.target_loss.temperature = self.selfsup_loss.temperature
            losses["targets"] = self.target_loss(z, labels)
        weights = weights_of(method)
        loss = sum(weights[name] * value for name, value in losses.items())
        scalars = dict(losses)

        if mixing:
            guide = loss if method.attribution == "joint" else losses[method.attribution]
            generator = torch.Generator(views.device).manual_seed(seed)
            maps = None
            if looking and in_parts:
                maps = self.attribute_in_parts(views, z, guide)
            elif looks and not looking:
                maps = torch.zeros_like(views[:, 0])  # flat: boxes at random places
            if mix.name == "extra_view":
                mixed = self.extra_view(batch, seed)
            else:
                mixed = self.mixer(views, guide, generator, projections=z, attribution=maps)
            p = self.project(mixed.images)
            match method.mixed_loss:
                case "selfsup":
                    mixed_loss = self.selfsup_loss(z, p, mixed.kept)
                case "supervised":
                    mixed_loss = self.supervised_loss(z, labels, p, mixed.kept)
                case "targets":
                    mixed_loss = self.target_loss(p, labels, labels[mixed.partner], mixed.kept)
            loss = loss + mix.weight * weights[method.mixed_loss] * mixed_loss
            scalars |= {"mixed": mixed_loss, "kept": mixed.kept.mean()}
            self.pictures = views, mixed
        self.scalars = {f"train/{name}": value.detach() for name, value in {"loss": loss, **scalars}.items()}
        self.steps = batch.epoch * self.loader.steps_per_epoch + batch.step + 1
        return loss

    def extra_view(self, batch: Batch, seed: int) -> Mixed:
        """The control of equal compute: where others mix, one more view of each view's image, nothing pasted."""
        images = batch.images if batch.images.ndim == 4 else batch.images[:, 2:]  # of photographs, four views are cut
        views = self.augment(images, seed_of(seed, 1)).contiguous(memory_format=self.layout)
        rows = torch.arange(len(views), device=views.device)
        return Mixed(views, torch.ones(len(views), device=views.device), rows)

    @property
    def needs_selfsup(self) -> bool:
        method = self.config.method
        return bool(method.selfsup) or (self.mixer is not None and method.attribution == "selfsup")

    @property
    def crops(self) -> Crops:
        """The views that a step needs of each photograph."""
        augment = self.config.data.augment
        count = 4 if self.config.mix.name == "extra_view" else 2
        return Crops(count, tuple(augment.crop), tuple(augment.ratio))

    def train_dataloader(self) -> TrainLoader:
        self.loader = TrainLoader(
            self.train_set,
            self.config.batch_size,
            self.config.seed,
            self.config.epochs,
            self.start,
            device=self.device,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            workers=decoders(self.config.data.workers, self.trainer.world_size // self.trainer.num_nodes),
            crops=self.crops,
            on_bad_image="tell" if self.config.data.on_bad_image == "error" else "skip",  # Guard raises, everywhere
        )
        return self.loader

    def configure_optimizers(self):
        optimizer = build_optimizer(self.config, self.parameters())
        per_epoch = len(self.train_set) // self.config.batch_size / self.trainer.accumulate_grad_batches
        total, warmup = (round(n * per_epoch) for n in (self.config.epochs, self.config.optimizer.warmup_epochs))
        schedule = CosineWarmupScheduler(optimizer, warmup, total, end_value=self.config.optimizer.final_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_mixer(config: MixConfig) -> Mixer | None:
    """The mixer that a config asks for; None for ``mix=none``.

    Raises:
        ValueError: unknown mixer or option.
    """
    if config.name == "none":
        return None
    if config.name == "extra_view":
        return Mixer()  # never called: see Pretraining.extra_view
    mixer = MIXERS.pick("mix.name", config.name)
    known = inspect.signature(mixer).parameters
    for key in config.options:
        if key not in known:
            raise ValueError(f"mix.options.{key}: {config.name} has no such argument; {nearest(key, known)}")
    try:
        return mixer(**config.options)
    except ValueError as error:  # it begins with the argument's name
        raise ValueError(f"mix.options.{error}") from error
    except TypeError as error:
        raise ValueError(f"mix.options: {config.name} does not take {dict(config.options)} ({error})") from error


def build_target_loss(config: Config, train: ImageSet) -> OrthogonalTargetLoss:
    """
    Raises:
        ValueError: more classes than the projections have dimensions.
    """
    classes, dim = int(train.labels.max()) + 1, config.encoder.head_dim
    if classes > dim:
        raise ValueError(f"encoder.head_dim: {classes} class targets at right angles need {classes} or more, got {dim}")
    return OrthogonalTargetLoss(classes, dim, config.method.temperature, config.method.smoothing)


def weights_of(method: MethodConfig) -> dict[str, float]:
    """The losses by name, each with its weight."""
    return {"selfsup": method.selfsup, "supervised": method.supervised, "targets": method.targets}


def check_mixing(method: MethodConfig) -> None:
    """
    Raises:
        ValueError: the mixed images enter a loss, or attribution follows one, that the method does not have.
    """
    has = [name for name, weight in weights_of(method).items() if weight]
    if method.mixed_loss not in has:
        raise ValueError(f"method.mixed_loss: {method.name} has only {' or '.join(has)}, got {method.mixed_loss!r}")
    guides = ["selfsup", *(name for name in has if name != "selfsup")]  # NT-Xent needs no labels: any method can ask it
    guides += ["joint"] if len(guides) > 1 else []
    if method.attribution not in guides:
        raise ValueError(f"method.attribution: {method.name} has {', '.join(guides)}, got {method.attribution!r}")


def mixes_at(config: MixConfig, seed: int, epoch: int, step: int) -> bool:
    """Whether this step mixes. The same on every process: one that mixed alone would wait forever in the gather."""
    if epoch < config.start_epoch or (config.end_epoch is not None and epoch >= config.end_epoch):
        return False
    return np.random.default_rng([seed, epoch, step]).random() < config.probability


def temperature_at(method: MethodConfig, done: float) -> float:
    """The temperature when the share ``done`` of the training is over."""
    if method.temperature_end is None:
        return method.temperature
    return method.temperature + (method.temperature_end - method.temperature) * (1 - math.cos(math.pi * done)) / 2


def learning_rate(config: Config) -> float:
    """The linear scaling rule of arXiv 1706.02677."""
    return config.optimizer.base_lr * config.batch_size / 256


def compile_stages(backbone: nn.Module, watched: Sequence[str]) -> None:
    """Compile each stage by itself: through a network compiled as one, attribution could not take its gradients.

    Args:
        watched: layers that attribution looks at; what they lie in is compiled in parts.

    Raises:
        ValueError: no known stages.
    """
    torch._functorch.config.donated_buffer = False  # attribution walks the graph before the backward pass does
    # To torch all stages are one function, compiled eight times at most: with and without attribution, for evaluation.
    import torch._dynamo.config as dynamo  # only here: it takes seconds

    dynamo.cache_size_limit = max(dynamo.cache_size_limit, 64)  # recompile_limit, as torch 2.6 knows it too
    stages = find_stages(backbone)
    if not stages:
        raise ValueError(f"speed.compile: {type(backbone).__name__} has no stages to compile one by one")
    while stages:
        name = stages.pop()
        module = backbone.get_submodule(name)
        if any(layer.startswith(f"{name}.") for layer in watched):
            stages += [f"{name}.{child}" for child, _ in module.named_children()]
        else:
            module.compile()


def build_optimizer(config: Config, parameters) -> torch.optim.Optimizer:
    lr, weight_decay = learning_rate(config), config.optimizer.weight_decay
    # A fused step unscales float16's gradients by itself; before it they can't be clipped, or taken away to skip it.
    skips_scaled = config.on_nonfinite == "skip" and str(precision(config)) in ("16-mixed", "16")
    fused = config.speed.fused and not config.trainer.get("gradient_clip_val") and not skips_scaled
    match config.optimizer.name:
        case "adam":
            return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused)
        case "sgd":
            return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=fused)
        case "lars":
            return LARS(parameters, lr, momentum=0.9, weight_decay=weight_decay)
