"""The training step: two views, contrastive loss, attribution on the same graph, mixed views, one backward pass."""

import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F
from lightly.models.modules.heads import ProjectionHead
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmix.attribution import find_stages, still
from gradmix.gradmix import GradMix
from gradmix.mixer import Mixed, Mixer
from gradmix.mixing import MIXERS
from gradmix.outliers import disrupt
from gradmix.registry import nearest
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import Config, MixConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import Batch, TrainLoader, seed_of
from gradmix.ssl.data.views import Crops
from gradmix.ssl.machine import decoders
from gradmix.ssl.networks.backbones import build_backbone
from gradmix.ssl.networks.layout import layout_of
from gradmix.ssl.objective import (
    OWN,
    Rows,
    Taught,
    build_prototype_loss,
    build_target_loss,
    check_losses,
    losses_in,
    losses_of,
    outlier_loss_of,
    temperature_at,
    weights_of,
)
from gradmix.ssl.optimizer import build_optimizer, build_schedule
from gradmix.ssl.teacher import Teacher, build_teacher


class Pretraining(LightningModule):
    """SimCLR, SupCon, class targets or several of them on ``train``, with or without mixing.

    Args:
        config: the whole run's configuration.
        train: training images; labels are used by all but ``selfsup``.

    Attributes:
        start: steps that were done already when this session began.
        steps: steps done, over all epochs and sessions.
        scalars: what the last step has to report, on the device; reading them makes a GPU wait.
        pictures: the last views and what became of them.
        disrupted: the last outliers by attribution: views, maps, and what became of them.
    """

    def __init__(self, config: Config, train: ImageSet) -> None:
        super().__init__()
        method = config.method
        check_losses(config)
        if losses_in(method) != ["selfsup"] and (train.labels < 0).any():
            raise ValueError(f"method: {method.name} needs classes, but data.root has none; use method=simclr")
        self.config, self.train_set = config, train
        self.start = self.steps = 0
        self.mixer = build_mixer(config.mix)
        # Who looks where a loss comes from: the mixer, or one that only looks, for outliers.
        self.looker = self.mixer if self.mixer is not None and self.mixer.looks else None
        if config.outliers.name == "attribution":
            self.looker = self.looker or GradMix()
        backbone = build_backbone(config.encoder, train.size)
        self.layout = layout_of(backbone, config.speed.channels_last)
        self.backbone = backbone.to(memory_format=self.layout)
        features = self.backbone.num_features
        self.head = ProjectionHead(
            [(features, features, None, nn.ReLU()), (features, config.encoder.head_dim, None, None)]
        )
        self.augment = TwoViews(config.data.augment, train.size, constants=self.backbone.constants)
        classes = int(train.labels.max()) + 1
        self.target_loss = build_target_loss(config, classes) if method.targets else None
        self.prototype_loss = build_prototype_loss(config, classes) if method.prototypes else None
        self.losses = losses_of(config, self.target_loss, self.prototype_loss)
        self.outlier_loss = outlier_loss_of(config, self.target_loss or self.prototype_loss)
        self.weights = weights_of(config)
        self.teacher = build_teacher(config, self.backbone, self.head, self.target_loss, train.size)
        # All processes move the teacher's weights alike, so that these need not be sent. BatchNorm's statistics are, as
        # the student's are: they come from each process's own images.
        teachers = {name for name, _ in self.named_buffers() if name.startswith("teacher.")}
        sent = {f"teacher.{name}" for name, _ in self.named_buffers()}
        self._ddp_params_and_buffers_to_ignore = sorted(teachers - sent)
        watched = self.looker.layers_in(self.backbone) if self.looker is not None else []
        if config.speed.compile:
            compile_stages(self.backbone, watched)
        self.scalars: dict[str, Tensor] = {}
        self.pictures: tuple[Tensor, Mixed] | None = None
        self.disrupted: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def taught_by(self) -> str | None:
        """SHA-256 of a frozen teacher's weights; None without one."""
        return None if self.teacher is None else self.teacher.hash

    def embed(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Views ``[N, 3, S, S]`` to features ``[N, F]`` and normalised projections ``[N, D]``, in micro-batches if the
        config has them.

        A micro-batch keeps nothing but these, and is computed again in the backward pass: gradient caching
        (arXiv 2101.06983). BatchNorm sees each micro-batch by itself, and counts it once.
        """
        size = self.config.speed.micro_batch
        if size is None:
            return self._embed(views)
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), still(self.backbone)))
        features, z = zip(*(again(self._embed, part) for part in _parts(views, size)), strict=True)
        return torch.cat(features), torch.cat(z)

    def _embed(self, views: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(views)
        return features, F.normalize(self.head(features).float(), dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch: of its views and, at the steps that mix, of what the mixer makes of them.

        Teachers (``distill``) and outliers are not the paper's; without them the lines on them do nothing.
        """
        method, mix = self.config.method, self.config.mix
        seed = seed_of(self.config.seed, batch.epoch, batch.step, self.global_rank)
        torch.manual_seed(seed_of(seed, 4))  # what a network drops at random, too, is a function of the step
        mixer = self.mixer if mixes_at(mix, self.config.seed, batch.epoch, batch.step) else None
        asked = (mixer is not None and mixer.looks) or self.config.outliers.name == "attribution"
        looks = asked and batch.step % mix.attribution_every == 0
        done = (batch.epoch + batch.step / self.loader.steps_per_epoch) / self.config.epochs
        temperature = temperature_at(method, done)
        if mixer is not None:
            self.pictures = None  # those of the step before, so that no two steps' lie in the device's memory
        if looks:
            self.disrupted = None

        # Two views of every image, and the losses of them.
        views = self.draw_views(batch.images, seed)  # [2B, 3, H, W]
        with self.watched(looks):
            features, z = self.embed(views)  # [2B, F], [2B, D]
        taught = self.teach(batch, views, temperature)
        rows = Rows(z, batch.labels.repeat(2), temperature, features=features, taught=taught)
        losses = {name: loss(rows) for name, loss in self.losses.items()}

        # Where the gradient of one of them points, on the same graph, and the images that are made by it.
        guide = self.guide(losses)
        maps = self.attribute(views, z, guide) if looks else None  # [2B, H, W]
        disrupted = None if maps is None else self.disrupt(views, maps, seed_of(seed, 2))  # [M, 3, H, W]
        mixed = None if mixer is None else self.mix(mixer, batch, views, z, guide, maps, seed)

        # These go through the network in one more pass.
        outliers = None
        if mixed is not None:
            mixed_features, p, outliers = self.embed_more(mixed.images, disrupted)  # [2B, F], [2B, D], [M, D]
            rows = rows._replace(p=p, kept=mixed.kept, other=rows.labels[mixed.partner], partner=mixed.partner)
            losses["mixed"] = self.losses[method.mixed_loss](rows)
            if "distill" in losses and self.config.distill.mixed:
                taught_mixed = self.teach_mixed(mixed.images, temperature)
                rows = rows._replace(mixed_features=mixed_features, taught_mixed=taught_mixed)
                losses["distill_mixed"] = self.losses["distill"](rows)
            self.pictures = views, mixed
        elif disrupted is not None:
            outliers = self.embed(disrupted)[1]
        if outliers is not None:
            losses["outliers"] = self.outlier_loss(rows._replace(outliers=outliers))

        total = self.add_up(losses)
        told = {"loss": total, **losses} | ({} if mixed is None else {"kept": mixed.kept.mean()})
        self.scalars = {f"train/{name}": value.detach() for name, value in told.items()}
        self.steps = self.batches_before(batch) + 1
        return total

    def draw_views(self, images: Tensor, seed: int) -> Tensor:
        """Two random views ``[2B, 3, S, S]`` of images ``[B, 3, S, S]``, or of their crops ``[B, V, 3, S, S]``,
        laid out as the network wants them."""
        return self.augment(images, seed).contiguous(memory_format=self.layout)

    def watched(self, looks: bool) -> AbstractContextManager[None]:
        """Around the forward pass. One in micro-batches keeps nothing to look at: :meth:`attribute` repeats it."""
        if self.looker is None or not looks or self.config.speed.micro_batch is not None:
            return nullcontext()
        return self.looker.watch(self.backbone)

    def guide(self, losses: dict[str, Tensor]) -> Tensor:
        """The loss that attribution follows: one of the method's own, or all of them together."""
        own = {name: value for name, value in losses.items() if name in OWN}
        followed = self.config.method.attribution
        return own[followed] if followed in own else self.add_up(own)

    def add_up(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of losses."""
        return cast(Tensor, sum(self.weights[name] * value for name, value in losses.items()))

    def attribute(self, views: Tensor, z: Tensor, guide: Tensor) -> Tensor:
        """The maps ``[2B, H, W]`` of the loss ``guide``: where in the views its gradient points.

        Through micro-batches the gradient at ``z`` is handed on one at a time.
        """
        assert self.looker is not None  # somebody asks
        size = self.config.speed.micro_batch
        if size is None:
            return cast(Tensor, self.looker.attribute(views, guide))
        (gradient,) = torch.autograd.grad(guide, z, retain_graph=True)
        maps = []
        for part, its_gradient in zip(_parts(views, size), _parts(gradient, size), strict=True):
            with still(self.backbone), self.looker.watch(self.backbone):
                _, its_z = self._embed(part)
            maps.append(cast(Tensor, self.looker.attribute(part, (its_z * its_gradient).sum())))
        return torch.cat(maps)

    def mix(
        self, mixer: Mixer, batch: Batch, views: Tensor, z: Tensor, guide: Tensor, maps: Tensor | None, seed: int
    ) -> Mixed:
        """What the mixer makes of the views; extra_view has others, in which nothing is mixed."""
        if self.config.mix.name == "extra_view":
            others = batch.images if batch.images.ndim == 4 else batch.images[:, 2:]  # of photographs, four are cut
            views = self.draw_views(others, seed_of(seed, 1))
        if mixer.looks and maps is None:  # flat: boxes lie at random places
            maps = torch.zeros_like(views[:, 0])
        generator = torch.Generator(views.device).manual_seed(seed_of(seed, 3))  # not the stream of the views
        return mixer(views, guide, generator, projections=z, attribution=maps if mixer.looks else None)

    def batches_before(self, batch: Batch) -> int:
        """How many batches have been before this one, over all epochs."""
        return batch.epoch * self.loader.steps_per_epoch + batch.step

    def teach(self, batch: Batch, views: Tensor, temperature: float) -> Taught | None:
        """What the teacher makes of the views; None without one. It follows the student once per optimizer step."""
        if self.teacher is None:
            return None
        steps, since = divmod(self.batches_before(batch), self.config.trainer.get("accumulate_grad_batches", 1))
        if since == 0:
            self.teacher.follow(self.backbone, self.head, steps)
        return self._taught(self.teacher, views, temperature)

    def teach_mixed(self, images: Tensor, temperature: float) -> Taught | None:
        """What the teacher makes of the mixed images themselves; None for relations, which do not ask."""
        if self.teacher is None or self.config.distill.form != "logits":
            return None
        return self._taught(self.teacher, images, temperature)

    def _taught(self, teacher: Teacher, images: Tensor, temperature: float) -> Taught:
        """In micro-batches, if the config has them: a teacher sees each image by itself."""
        parts = [teacher(part, temperature) for part in _parts(images, self.config.speed.micro_batch or len(images))]
        return Taught._make(None if of[0] is None else torch.cat(of) for of in zip(*parts, strict=True))

    def disrupt(self, views: Tensor, maps: Tensor, seed: int) -> Tensor | None:
        """Outliers ``[M, 3, S, S]`` of the first views of the batch; None where none are asked for."""
        config = self.config.outliers
        if config.name != "attribution":
            return None
        count = self.outlier_count(len(views))
        views, maps, generator = views[:count], maps[:count], torch.Generator(views.device).manual_seed(seed)
        images = disrupt(views, maps, generator, config.how, config.pixels, config.amount)
        self.disrupted = views, maps, images
        return images

    def outlier_count(self, views: int) -> int:
        """How many of so many views become outliers: an even number, for BatchNorm has nothing to compare one with."""
        return 2 * max(1, round(self.config.outliers.share * views / 2))

    def embed_more(self, mixed: Tensor, disrupted: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features and projections of mixed images, and projections of outliers: one forward pass, one BatchNorm."""
        if disrupted is not None:
            features, p = self.embed(torch.cat([mixed, disrupted]).contiguous(memory_format=self.layout))
            return features[: len(mixed)], p[: len(mixed)], p[len(mixed) :]
        features, p = self.embed(mixed)
        return features, p, p[: self.outlier_count(len(p))] if self.config.outliers.name == "mixed" else None

    @property
    def crops(self) -> Crops:
        """The views that a step needs of each photograph."""
        augment = self.config.data.augment
        count = 4 if self.config.mix.name == "extra_view" else 2
        return Crops(count, augment.crop, augment.ratio)

    def train_dataloader(self) -> TrainLoader:
        """The run's batches from the step on that it has reached; this process's share of each."""
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and its schedule, a step of which is one of the optimizer's."""
        optimizer = build_optimizer(self.config, self.parameters())
        per_epoch = len(self.train_set) // self.config.batch_size / self.trainer.accumulate_grad_batches
        schedule = build_schedule(self.config, optimizer, per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_mixer(config: MixConfig) -> Mixer | None:
    """The mixer that a config asks for; None for ``mix=none``.

    Raises:
        ValueError: unknown mixer or option.
    """
    if config.name == "none":
        return None
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


def mixes_at(config: MixConfig, seed: int, epoch: int, step: int) -> bool:
    """Whether this step mixes. The same on every process: one that mixed alone would wait forever in the gather."""
    if epoch < config.start_epoch or (config.end_epoch is not None and epoch >= config.end_epoch):
        return False
    return np.random.default_rng([seed, epoch, step]).random() < config.probability


def _parts(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """At most ``size`` rows each, and about as many in all: BatchNorm can't take a single one that is left over."""
    return rows.tensor_split(math.ceil(len(rows) / size))


def compile_stages(backbone: nn.Module, watched: Sequence[str]) -> None:
    """Compile each stage by itself: through a network compiled as one, attribution could not take its gradients.

    Args:
        watched: layers that attribution looks at; what they lie in is compiled in parts.

    Raises:
        ValueError: no known stages.
    """
    torch._functorch.config.donated_buffer = False  # attribution walks the graph before the backward pass does
    # To torch all stages are one function, compiled eight times at most: with and without attribution, for evaluation.
    dynamo = torch._dynamo.config  # torch imports it, which takes seconds, when it is asked for it
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
