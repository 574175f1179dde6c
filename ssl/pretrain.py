"""The training step: two views, contrastive loss, attribution on the same graph, mixed views, one backward pass."""

import inspect
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
from gradmix.mixer import Mixed, Mixer
from gradmix.mixing import MIXERS
from gradmix.registry import nearest
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import Config, MixConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import Batch, TrainLoader, seed_of
from gradmix.ssl.data.views import Crops
from gradmix.ssl.machine import decoders
from gradmix.ssl.networks.backbones import build_backbone
from gradmix.ssl.networks.layout import layout_of
from gradmix.ssl.objective import Rows, build_target_loss, check_mixing, losses_of, temperature_at, weights_of
from gradmix.ssl.optimizer import build_optimizer, build_schedule


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

    def __init__(self, config: Config, train: ImageSet) -> None:
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
        backbone = build_backbone(config.encoder, train.size)
        self.layout = layout_of(backbone, config.speed.channels_last)
        self.backbone = backbone.to(memory_format=self.layout)
        watched = self.mixer.layers_in(self.backbone) if self.mixer is not None and self.mixer.looks else []
        if config.speed.compile:
            compile_stages(self.backbone, watched)
        features = self.backbone.num_features
        self.head = ProjectionHead(
            [(features, features, None, nn.ReLU()), (features, config.encoder.head_dim, None, None)]
        )
        self.augment = TwoViews(config.data.augment, train.size, constants=self.backbone.constants)
        self.target_loss = build_target_loss(config, int(train.labels.max()) + 1) if method.targets else None
        self.losses = losses_of(method, self.mixer is not None, self.target_loss)
        self.weights = weights_of(method)
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
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), still(self.backbone)))
        return torch.cat([again(self._project, part) for part in views.split(size)])

    def _project(self, views: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(views)).float(), dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch: of its views and, at the steps that mix, of what the mixer makes of them."""
        method, mix = self.config.method, self.config.mix
        seed = seed_of(self.config.seed, batch.epoch, batch.step, self.global_rank)
        torch.manual_seed(seed)  # what a network drops at random, too, is a function of the step
        mixer = self.mixer if mixes_at(mix, self.config.seed, batch.epoch, batch.step) else None
        looks = mixer is not None and mixer.looks and batch.step % mix.attribution_every == 0
        done = (batch.epoch + batch.step / self.loader.steps_per_epoch) / self.config.epochs
        temperature = temperature_at(method, done)

        views = self.draw_views(batch.images, seed)  # [2B, 3, H, W]
        labels = batch.labels.repeat(2)  # [2B]
        with self.watched(looks):
            z = self.project(views)  # [2B, D]
        rows = Rows(z, labels, temperature)
        losses = {name: loss(rows) for name, loss in self.losses.items()}
        total = sum((self.weights[name] * value for name, value in losses.items()), z.new_zeros(()))
        scalars = dict(losses)

        if mixer is not None:
            guide = total if method.attribution == "joint" else losses[method.attribution]
            maps = self.attribute(mixer, views, z, guide, looks)  # [2B, H, W]
            others = batch.images if batch.images.ndim == 4 else batch.images[:, 2:]  # of photographs, four are cut
            again = partial(self.draw_views, others, seed_of(seed, 1))  # what extra_view calls
            generator = torch.Generator(views.device).manual_seed(seed)
            mixed = mixer(views, guide, generator, projections=z, attribution=maps, new_views=again)
            p = self.project(mixed.images)  # [2B, D]
            rows = rows._replace(p=p, kept=mixed.kept, other=labels[mixed.partner])
            mixed_loss = self.losses[method.mixed_loss](rows)
            total = total + mix.weight * self.weights[method.mixed_loss] * mixed_loss
            scalars |= {"mixed": mixed_loss, "kept": mixed.kept.mean()}
            self.pictures = views, mixed

        self.scalars = {f"train/{name}": value.detach() for name, value in {"loss": total, **scalars}.items()}
        self.steps = batch.epoch * self.loader.steps_per_epoch + batch.step + 1
        return total

    def draw_views(self, images: Tensor, seed: int) -> Tensor:
        """Two random views ``[2B, 3, S, S]`` of images ``[B, 3, S, S]``, or of their crops ``[B, V, 3, S, S]``,
        laid out as the network wants them."""
        return self.augment(images, seed).contiguous(memory_format=self.layout)

    def watched(self, looks: bool) -> AbstractContextManager[None]:
        """Around the forward pass. One in micro-batches keeps nothing to look at: :meth:`attribute` repeats it."""
        if self.mixer is None or not looks or self.config.speed.micro_batch is not None:
            return nullcontext()
        return self.mixer.watch(self.backbone)

    def attribute(self, mixer: Mixer, views: Tensor, z: Tensor, guide: Tensor, looks: bool) -> Tensor | None:
        """The maps ``[2B, H, W]`` of the loss ``guide``: where in the views its gradient points.

        At steps that do not look they are flat, so that boxes lie at random places; None for mixers that never look.
        Through micro-batches the gradient at ``z`` is handed on one at a time.
        """
        if not mixer.looks:
            return None
        if not looks:
            return torch.zeros_like(views[:, 0])
        size = self.config.speed.micro_batch
        if size is None:
            return mixer.attribute(views, guide)
        (gradient,) = torch.autograd.grad(guide, z, retain_graph=True)
        maps = []
        for part, its_gradient in zip(views.split(size), gradient.split(size), strict=True):
            with still(self.backbone), mixer.watch(self.backbone):
                its_z = self._project(part)
            maps.append(cast(Tensor, mixer.attribute(part, (its_z * its_gradient).sum())))
        return torch.cat(maps)

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
