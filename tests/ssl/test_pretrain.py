"""One training step: micro-batches, switches, controls, and the losses' temperature."""

import math

import pytest
import torch

import gradmix.ssl.pretrain
from gradmix.attribution import layercam, record
from gradmix.ssl.config import EncoderConfig, SpeedConfig
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.losses import NTXentLoss, SupConLoss
from gradmix.ssl.pretrain import Pretraining, mixes_at
from gradmix.ssl.train import check


def step_gradients(module, batch):
    """The gradients of one training step, and the maps and boxes it mixed with."""
    module.zero_grad()
    module.training_step(batch, 0).backward()
    return {name: p.grad for name, p in module.named_parameters()}, module.pictures[1] if module.pictures else None


@pytest.fixture
def without_batch_statistics(monkeypatch):
    """Encoders with GroupNorm: what a row becomes does not depend on the other rows of the batch."""
    build = gradmix.ssl.pretrain.build_backbone

    def build_with_group_norm(*arguments):
        backbone = build(*arguments)
        for parent in list(backbone.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.BatchNorm2d):
                    setattr(parent, name, torch.nn.GroupNorm(2, child.num_features))
        return backbone

    monkeypatch.setattr(gradmix.ssl.pretrain, "build_backbone", build_with_group_norm)


def built(settings, data):
    torch.manual_seed(0)
    module = Pretraining(settings, data.train)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1)
    return module, next(iter(module.loader))


def built_of_timms(name, config, **settings):
    settings = config("unused", **settings)
    settings.encoder, settings.data.image_size = EncoderConfig(f"timm/{name}", width=None), 32
    return built(settings, load_data(settings.data, 0))


@pytest.mark.parametrize("method", ["simclr", "supcon", "joint"])
@pytest.mark.parametrize("mix", ["none", "cutmix", "gradmix"])
def test_micro_batches_have_the_gradient_of_the_whole_batch(method, mix, without_batch_statistics, config, data):
    module, batch = built(config("unused", method, mix), data)
    whole, mixed = step_gradients(module, batch)
    module.config.speed.micro_batch = 48  # 256 views: five parts and a smaller one
    parts, mixed_in_parts = step_gradients(module, batch)
    if mix != "none":
        assert torch.equal(mixed.boxes, mixed_in_parts.boxes)
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_micro_batches_of_timms_networks(name, config):
    module, batch = built_of_timms(name, config)
    whole, mixed = step_gradients(module, batch)
    module.config.speed.micro_batch = 48
    parts, mixed_in_parts = step_gradients(module, batch)
    torch.testing.assert_close(mixed.attribution, mixed_in_parts.attribution, atol=1e-3, rtol=1e-3)
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_no_view_is_left_over_from_micro_batches(config, data):
    module, _ = built(config("unused", speed=SpeedConfig(micro_batch=51)), data)
    sizes, embed = [], module._embed
    module._embed = lambda views: sizes.append(len(views)) or embed(views)
    module.embed(torch.rand(256, 3, 16, 16))  # 5 x 51, and one
    assert sizes == [43, 43, 43, 43, 42, 42]


def test_compiled_micro_batches_are_refused(config):
    with pytest.raises(ValueError, match=r"speed\.compile: not with speed\.micro_batch"):
        check(config("unused", speed=SpeedConfig(compile=True, micro_batch=8)))


def test_micro_batches_count_once_in_batch_statistics(config, data):
    module, batch = built(config("unused", speed=SpeedConfig(micro_batch=128)), data)
    step_gradients(module, batch)
    # 256 views in two parts, then 256 mixed ones: the passes for attribution and backward are not counted
    assert module.backbone.bn1.num_batches_tracked == 4


def test_attribution_every_other_step(config, data):
    module, batch = built(config("unused", mixing={"attribution_every": 2}), data)
    for step in range(4):
        _, mixed = step_gradients(module, batch._replace(step=step))
        assert bool(mixed.attribution.any()) == (step % 2 == 0)
        assert (mixed.kept < 1).all()


@pytest.mark.parametrize("switch", ["channels_last", "compile"])
def test_a_switch_changes_the_speed_and_not_the_gradient(switch, monkeypatch, config, data):
    compile_module = torch.nn.Module.compile  # inductor would take a minute and a C++ compiler
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    settings = config("unused")
    found = []
    for on in (True, False):
        setattr(settings.speed, switch, on)
        found.append(step_gradients(*built(settings, data))[0])
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_timms_networks_compile(name, monkeypatch, config):
    compile_module, compiled = torch.nn.Module.compile, []

    def quickly(module):
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    expected = step_gradients(*built_of_timms(name, config))
    found = step_gradients(*built_of_timms(name, config, speed=SpeedConfig(compile=True)))
    assert len(compiled) >= 4
    torch.testing.assert_close(found[1].attribution, expected[1].attribution, atol=1e-3, rtol=1e-3)
    # Biases before a BatchNorm have no gradient but what rounding leaves, which follows the size of all the others.
    rounding = 1e-7 * sum(gradient.norm() for gradient in expected[0].values())
    for name, gradient in expected[0].items():
        assert (gradient - found[0][name]).norm() <= 1e-3 * gradient.norm() + rounding, name


def test_evaluation_between_steps_leaves_no_stage_uncompiled(monkeypatch, config, data):
    """To torch all stages are one function, which it compiles eight times by default, then no more."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    settings = config("unused", mixing={"start_epoch": 1}, speed=SpeedConfig(compile=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True, cache_size_limit=8):
        module, batch = built(settings, data)
        module.training_step(batch, 0)
        module.backbone.eval()
        with torch.inference_mode():
            module.backbone(torch.rand(7, 3, 8, 8))
        module.backbone.train()
        module.training_step(batch._replace(epoch=1), 0)  # the first that attribution watches


def test_a_network_that_gradmix_does_not_know_is_refused_before_training(config):
    with pytest.raises(ValueError, match=r"layers: no default for the last 3 stages of CoaT; name some"):
        built_of_timms("coat_tiny", config)
    with pytest.raises(ValueError, match=r"speed\.compile: CoaT has no stages to compile"):
        built_of_timms("coat_tiny", config, mix="none", speed=SpeedConfig(compile=True))


def test_no_two_steps_pictures_are_kept(config, data):
    """They are as large as the batch: while the network works on one, that of the step before is gone."""
    module, batch = built(config("unused"), data)
    kept = []
    with module.backbone.register_forward_hook(lambda *_: kept.append(module.pictures)):
        for step in range(2):
            module.training_step(batch._replace(step=step), 0)
    assert kept == [None] * 4 and module.pictures is not None


@pytest.mark.parametrize("method", ["joint", "supcon"])
def test_the_losses_have_the_temperature_of_their_step(method, config, data):
    module, batch = built(config("unused", method, epochs=2), data)
    module.config.method.temperature_end = 0.5
    module.training_step(batch._replace(epoch=1, step=1), 0)  # 6 of 10 steps are over
    t = 0.3 - 0.2 * math.cos(math.pi * 0.6)
    views, mixed = module.pictures
    labels = batch.labels.repeat(2)
    with torch.no_grad():
        z, p = module.embed(views)[1], module.embed(mixed.images)[1]
        expected = {"train/supervised": SupConLoss(t)(z, labels)}
        if method == "joint":
            expected |= {"train/selfsup": NTXentLoss(t)(z), "train/mixed": NTXentLoss(t)(z, p, mixed.kept)}
        else:
            expected |= {"train/mixed": SupConLoss(t)(z, labels, p, mixed.kept)}
    for name, value in expected.items():
        torch.testing.assert_close(module.scalars[name], value, rtol=1e-5, atol=0)
    torch.testing.assert_close(module.scalars["train/loss"], sum(expected.values()), rtol=1e-5, atol=0)


def test_an_extra_view_is_a_third_one_of_the_same_images(config, data):
    module, batch = built(config("unused", mix="extra_view"), data)
    module.training_step(batch, 0)
    views, mixed = module.pictures
    assert (mixed.kept == 1).all() and torch.equal(mixed.partner, torch.arange(len(views)))
    both = torch.cat([views, mixed.images]).flatten(1).double()
    both = (both - both.mean(1, keepdim=True)) / both.std(1, keepdim=True)
    similarity = both[len(views) :] @ both[: len(views)].T
    own = similarity.diagonal()
    assert (own < similarity.new_tensor(views[0].numel() - 1.0) * 0.999).float().mean() > 0.9  # not the view itself
    assert own.mean() > 1.3 * similarity.mean()  # but of its image: as alike as two views of one are


def test_what_is_drawn_is_of_its_place(monkeypatch, config, data):
    """Views, boxes and what the network drops: others at every seed, epoch, step and process, and there the same."""
    module, batch = built(config("unused", mix="cutmix"), data)
    dropped = []
    module.head.register_forward_pre_hook(lambda head, inputs: dropped.append(torch.rand(64)))

    def drawn(**changes):
        module.config.seed = changes.pop("seed", 0)
        monkeypatch.setattr(Pretraining, "global_rank", changes.pop("rank", 0))
        torch.rand(3)  # what happened before must not matter
        del dropped[:]
        module.training_step(batch._replace(**changes), 0)
        views, mixed = module.pictures
        return views, mixed.boxes, dropped[0]

    first = drawn()
    assert all(map(torch.equal, first, drawn()))
    for changes in ({"seed": 1}, {"epoch": 1}, {"step": 1}, {"rank": 1}):
        assert not any(map(torch.equal, first, drawn(**changes))), changes


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_what_is_mixed_and_dropped_has_nothing_to_do_with_how_views_are_drawn(flip, config, data):
    """They once read one random stream: ResizeMix kept more of the photographs' views that were jittered."""
    settings = config("unused", mix="resizemix")
    settings.data.augment.flip = flip
    module, batch = built(settings, data)
    batch = batch._replace(images=batch.images[:16, None].expand(-1, 2, -1, -1, -1), labels=batch.labels[:16])
    (jitter,) = (step for step in module.augment.steps if type(step).__name__ == "ColorJitter")
    drawn = {"jittered": [], "kept": [], "dropped": []}
    module.head.register_forward_pre_hook(lambda head, inputs: drawn["dropped"].append(torch.rand(32)))
    for step in range(80):
        module.training_step(batch._replace(step=step), 0)
        drawn["dropped"].pop()  # of the mixed ones
        drawn["jittered"].append(jitter._params["batch_prob"].float())
        drawn["kept"].append(module.pictures[1].kept)
    correlation = torch.corrcoef(torch.stack([torch.cat(of) for of in drawn.values()])) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(80 * 32)  # five standard errors


def test_which_steps_mix_is_of_the_runs_seed(config, data):
    module, batch = built(config("unused", mix="cutmix", mixing={"probability": 0.5}), data)
    mix = module.config.mix
    step = next(step for step in range(99) if mixes_at(mix, 0, 0, step) != mixes_at(mix, 1, 0, step))
    for module.config.seed in (0, 1):
        module.training_step(batch._replace(step=step), 0)
        assert ("train/mixed" in module.scalars) == mixes_at(mix, module.config.seed, 0, step)


@pytest.mark.parametrize("followed", ["selfsup", "supervised", "joint"])
def test_attribution_follows_the_loss_that_it_was_asked_to(followed, config, data):
    settings = config("unused")
    settings.method.attribution, settings.method.supervised = followed, 0.5
    module, batch = built(settings, data)
    module.training_step(batch, 0)
    views, mixed = module.pictures
    activations: list[torch.Tensor] = []
    with record(module.backbone, ["layer2", "layer3", "layer4"], activations):
        z = module.embed(views)[1]
    losses = {"selfsup": NTXentLoss(0.1)(z), "supervised": SupConLoss(0.1)(z, batch.labels.repeat(2))}
    losses["joint"] = losses["selfsup"] + 0.5 * losses["supervised"]
    torch.testing.assert_close(mixed.attribution, layercam(losses[followed], activations, (8, 8)), atol=1e-3, rtol=0)
