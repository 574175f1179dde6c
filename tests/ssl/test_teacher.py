"""Teachers: what they are asked, that nothing of them learns, and that a run with one goes on exactly."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradmix.ssl.config import DistillConfig, EncoderConfig, SpeedConfig
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.distillation import correlation_loss, relation_loss, two_hot_loss
from gradmix.ssl.optimizer import build_optimizer
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.teacher import Teacher
from gradmix.ssl.train import check, train


def weights(run_dir):
    return load_file(run_dir / "backbone.safetensors") | load_file(run_dir / "head.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.steps == self.step:
            raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config, data):
    """Finished runs to be taught by: joint, and a wider one with class targets."""
    folder = tmp_path_factory.mktemp("teachers")
    train(config(folder / "joint", mix="none"), data)
    wide = config(folder / "sphor", "sphor", "none")
    wide.encoder, wide.data = EncoderConfig("resnet18", width=8, head_dim=32), replace(wide.data)
    train(wide, data)
    return folder


def asked(name, runs, **changes):
    if name == "run":
        changes = {"teacher": str(runs / ("sphor" if changes.get("form") == "logits" else "joint"))} | changes
    return DistillConfig(name, **changes)


def built(settings, data):
    torch.manual_seed(0)
    module = Pretraining(settings, data.train)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1)
    return module, next(iter(module.loader))


def test_without_a_teacher_there_is_nothing_of_it(config, data):
    module, batch = built(config("unused"), data)
    module.training_step(batch, 0)
    assert module.teacher is None and "distill" not in module.losses
    assert not any("distill" in name for name in module.scalars)
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize("name", ["ema", "run"])
@pytest.mark.parametrize("space", ["features", "projections"])
def test_the_step_follows_the_neighbours_of_both_raw_images(name, space, runs, config, data):
    distill = asked(name, runs, space=space, weight=0.7, mixed=0.4, temperature=0.2)
    module, batch = built(config("unused", distill=distill), data)
    module.training_step(batch, 0)
    views, mixed = module.pictures
    with torch.no_grad():
        found = [module.embed(x)[space == "projections"] for x in (views, mixed.images)]
        z, p = (F.normalize(x, dim=1) for x in found)
        network = module.teacher
        network.train()  # it stays as it is
        assert not any(part.training for part in network.modules())
        t = network.backbone(views)
        t = F.normalize(t if space == "features" else network.head(t), dim=1)
    own = torch.arange(len(z))
    expected = relation_loss(z, z, t, t, own, 0.2)
    theirs = relation_loss(p, z, t, t, own, 0.2, mixed.kept)
    theirs = theirs + relation_loss(p, z, t[mixed.partner], t, mixed.partner, 0.2, 1 - mixed.kept)
    torch.testing.assert_close(module.scalars["train/distill"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.scalars["train/distill_mixed"], theirs, rtol=1e-4, atol=1e-6)
    parts = [module.scalars[f"train/{part}"] for part in ("supervised", "selfsup", "mixed")]
    torch.testing.assert_close(module.scalars["train/loss"], sum(parts) + 0.7 * expected + 0.4 * theirs)


@pytest.mark.parametrize("name", ["ema", "run"])
def test_the_step_follows_class_logits(name, runs, config, data):
    distill = asked(name, runs, form="logits", mixed=0.5)
    module, batch = built(config("unused", "sphor", "mixup", distill=distill, mixing={"weight": 0.0}), data)
    module.training_step(batch, 0)
    views, mixed = module.pictures
    labels = batch.labels.repeat(2)
    other = labels[mixed.partner]
    with torch.no_grad():
        s, m = (module.embed(x)[1] @ module.target_loss.targets.T / 0.1 for x in (views, mixed.images))
        z = [F.normalize(module.teacher.head(module.teacher.backbone(x)), dim=1) for x in (views, mixed.images)]
        t, guess = (x @ module.teacher.targets.targets.T / 0.1 for x in z)
    sure = torch.tensor([int(g) in (int(a), int(b)) for g, a, b in zip(guess.argmax(1), labels, other, strict=True)])
    assert 0 < sure.sum() < len(sure)
    kept = mixed.kept
    expected = correlation_loss(m[sure], t[sure]) + two_hot_loss(m, labels, other, kept, 0.75, ~sure)
    expected = expected + kept.mean() * correlation_loss(m, t, kept)
    expected = expected + (1 - kept.mean()) * correlation_loss(m, t[mixed.partner], 1 - kept)
    torch.testing.assert_close(module.scalars["train/distill"], correlation_loss(s, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.scalars["train/distill_mixed"], expected, rtol=1e-4, atol=1e-5)
    total = module.scalars["train/targets"] + module.scalars["train/distill"] + 0.5 * expected
    torch.testing.assert_close(module.scalars["train/loss"], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ema", "run"])
def test_nothing_of_a_teacher_learns_or_costs_parameters(name, runs, config, data):
    settings = config("unused", distill=asked(name, runs))
    module, batch = built(settings, data)
    plain, _ = built(config("unused"), data)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the student begins alike
    before = {name: value.clone() for name, value in module.teacher.named_buffers()}
    module.training_step(batch, 0).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    for buffer, value in module.teacher.named_buffers():
        moves = name == "ema" and ("running" in buffer or "tracked" in buffer)  # statistics are those behind the views
        assert not value.requires_grad and (moves or torch.equal(value, before[buffer])), buffer
    kept = [name for name in module.state_dict() if name.startswith("teacher.")]
    assert bool(kept) == (module.taught_by is None)
    statistics = [buffer for buffer in before if "running" in buffer or "tracked" in buffer]
    ignored = {f"teacher.{buffer}" for buffer in before if buffer not in statistics}
    assert set(module._ddp_params_and_buffers_to_ignore) == ignored and statistics


def test_the_average_is_one_of_all_the_weights_so_far(config, data):
    settings = config("unused", mix="none", distill=DistillConfig("ema", momentum=0.6))
    module, _ = built(settings, data)
    optimizer, average = build_optimizer(settings, module.parameters()), {}
    for step, batch in zip(range(4), module.loader, strict=False):
        loss = module.training_step(batch, 0)
        now = {name: x.clone() for name, x in module.backbone.state_dict().items()}
        momentum = [0.0, 1 / 2, 0.6, 0.6][step]
        average = {
            name: momentum * average.get(name, 0.0) + (1 - momentum) * x if x.is_floating_point() else x
            for name, x in now.items()
        }
        for name, x in module.teacher.backbone.state_dict().items():
            torch.testing.assert_close(x, average[name], rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "distill"),
    [("joint", {"name": "ema"}), ("sphor", {"name": "ema", "form": "logits"}), ("joint", {"name": "run"})],
)
def test_a_run_that_died_goes_on_to_the_same_weights(method, distill, runs, tmp_path, config, data):
    distill = dict(distill)
    settings = [
        config(
            tmp_path / name,
            method,
            checkpoint_seconds=0,
            distill=asked(distill["name"], runs, **{k: v for k, v in distill.items() if k != "name"}),
        )
        for name in "ab"
    ]
    train(settings[0], data)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings[1], data, [Stop(7)])
    train(settings[1], data)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    told = [json.loads((tmp_path / name / "training.json").read_text()) for name in "ab"]
    assert told[1]["train/resumed_from_step"] == 6
    assert told[0]["train/distill"] == told[1]["train/distill"] > 0
    assert ("train/teacher" in told[0]) == (distill["name"] == "run")


def test_accumulated_steps_move_the_average_once(config, data):
    settings = config("unused", distill=DistillConfig("ema"))
    settings.trainer["accumulate_grad_batches"] = 2
    module, batch = built(settings, data)
    places = [batch._replace(epoch=epoch, step=step) for epoch in (0, 1) for step in range(5)]
    followed, follow = [], module.teacher.follow
    module.teacher.follow = lambda *given: (followed.append(given[2]), follow(*given))
    for place in places:
        module.training_step(place, 0)
    assert followed == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("form", ["relations", "logits"])
def test_a_teacher_sees_no_more_at_a_time_than_the_student(form, runs, config, data):
    distill = asked("run", runs, form=form)
    module, batch = built(config("unused", "sphor", "mixup", distill=distill, speed=SpeedConfig(micro_batch=48)), data)
    sizes = []
    with module.teacher.backbone.register_forward_pre_hook(lambda network, views: sizes.append(len(views[0]))):
        module.training_step(batch, 0)
    assert max(sizes) <= 48 and sum(sizes) == 256 * (2 if form == "logits" else 1)
    views = module.pictures[0]
    for parts, whole in zip(module.teach(batch, views, 0.1), module.teacher(views, 0.1), strict=True):
        assert (parts is None) == (whole is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


class Parallel(nn.Module):
    """What Lightning hands to DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self._ddp_params_and_buffers_to_ignore = [f"module.{x}" for x in module._ddp_params_and_buffers_to_ignore]

    def forward(self, batch):
        return self.module.training_step(batch, 0)


def one_of_two(rank, folder):
    settings, data = pickle.loads((folder / "given").read_bytes())
    torch.manual_seed(0)
    module = Pretraining(settings, data.train)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1, rank=rank, world_size=2)
    optimizer, parallel = build_optimizer(settings, module.parameters()), DistributedDataParallel(Parallel(module))
    seen, follow = [], module.teacher.follow

    def note_and_follow(*given):
        seen.append({name: value.clone() for name, value in module.teacher.named_buffers()})
        follow(*given)

    module.teacher.follow = note_and_follow
    for _, batch in zip(range(4), module.loader, strict=False):
        optimizer.zero_grad()
        parallel(batch).backward()
        optimizer.step()
    torch.save(seen, folder / f"{rank}.pt")


def test_two_processes_begin_every_step_with_the_same_average(in_processes, tmp_path, config, data):
    settings = config("unused", mix="none", distill=DistillConfig("ema", momentum=0.5))
    (tmp_path / "given").write_bytes(pickle.dumps((settings, data)))
    in_processes(one_of_two, 2)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(ours) == 4 and not same(ours[1], ours[3])
    assert all(same(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


def test_another_teacher_under_the_same_name_is_refused(runs, tmp_path, config, data):
    shutil.copytree(runs / "joint", tmp_path / "teacher")
    settings = config(
        tmp_path / "run", checkpoint_seconds=0, distill=DistillConfig("run", teacher=str(tmp_path / "teacher"))
    )
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, data, [Stop(3)])
    path = tmp_path / "teacher" / "backbone.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: x + 1 for name, x in load_file(path).items()}, path, metadata)
    with pytest.raises(ValueError, match=r"distill\.teacher: not the weights that .*run began with"):
        train(settings, data)


def test_a_file_of_weights_and_a_run_over_all_splits_teach(runs, tmp_path, config, data):
    torch.save(load_file(runs / "sphor" / "backbone.safetensors"), tmp_path / "wide.pt")
    module, batch = built(config("unused", distill=DistillConfig("run", teacher=str(tmp_path / "wide.pt"))), data)
    shutil.copytree(runs / "sphor", tmp_path / "all" / "split-0")
    of_split, _ = built(config("unused", distill=DistillConfig("run", teacher=str(tmp_path / "all"))), data)
    views = torch.rand(4, 3, 8, 8)
    assert module.teacher(views, 0.1).features.shape == (4, 64)  # wider than the student's 32
    torch.testing.assert_close(module.teacher(views, 0.1).features, of_split.teacher(views, 0.1).features)
    assert module.training_step(batch, 0).isfinite()


def test_a_teacher_sees_images_normalised_as_its_own(runs, config, data):
    module, _ = built(config("unused", distill=asked("run", runs)), data)
    pixels, views = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    other = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    views = (pixels - torch.tensor(other[0])[:, None, None]) / torch.tensor(other[1])[:, None, None]
    mean, std = (torch.tensor(x)[:, None, None] for x in module.backbone.constants)
    expected = module.teacher((pixels - mean) / std, 0.1).features
    renormalising = Teacher(module.teacher.backbone, None, constants=other)
    torch.testing.assert_close(renormalising(views, 0.1).features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "distill", "message"),
    [
        (
            "joint",
            {"name": "ema", "form": "logits"},
            r"distill\.form: logits are those of class targets .*method=joint",
        ),
        ("joint", {"name": "run"}, r"distill\.teacher: missing; distill=run needs"),
        ("joint", {"name": "ema", "teacher": "x"}, r"distill\.teacher: distill=ema follows the student's own average"),
        ("joint", {"name": "run", "teacher": "nowhere"}, r"distill\.teacher: nowhere is no weights file, and no finis"),
        (
            "sphor",
            {"name": "run", "teacher": "JOINT", "form": "logits"},
            "was trained with supervised and selfsup, not",
        ),
        ("joint", {"name": "somebody"}, r"distill\.name: expected one of none, ema, run, got 'somebody'"),
        ("joint", {"name": "ema", "temperature": 0.0}, r"distill\.temperature: expected a number above 0"),
    ],
)
def test_teachers_that_cannot_teach_are_refused_before_anything_is_read(method, distill, message, runs, config):
    if distill.get("teacher") == "JOINT":
        distill = distill | {"teacher": str(runs / "joint")}
    with pytest.raises(ValueError, match=message):
        check(config("unused", method, distill=DistillConfig(**distill)))


@pytest.mark.parametrize("name", ["ema", "run"])
def test_a_teacher_whose_batchnorm_would_be_exchanged_is_refused(name, runs, config, data):
    settings = config("unused", distill=asked(name, runs))
    settings.trainer["sync_batchnorm"] = True
    with pytest.raises(ValueError, match=rf"trainer\.sync_batchnorm: not with distill={name}, .* leave one of the two"):
        check(settings)
    with pytest.raises(TypeError):  # as torch has it: should that change, there is nothing left to refuse
        nn.SyncBatchNorm.convert_sync_batchnorm(built(settings, data)[0])
    settings.trainer["sync_batchnorm"] = False
    check(settings)


def test_logits_need_the_same_classes_and_relations_do_not(runs, tmp_path, config, data):
    renamed = replace(data, classes=[*data.classes[1:], data.classes[0]])
    settings = config(tmp_path / "a", "sphor", epochs=1, distill=asked("run", runs, form="logits"))
    with pytest.raises(ValueError, match=r"distill\.teacher: .*sphor has the classes 2, 4.*needs the same in the same"):
        train(settings, renamed)
    train(config(tmp_path / "b", epochs=1, distill=asked("run", runs)), renamed)


def test_views_of_another_size_are_refused(runs, config, data):
    settings = config("unused", distill=asked("run", runs))
    larger = replace(data.train, size=9)
    with pytest.raises(ValueError, match=r"joint was trained on 8 x 8 pixels, the views have 9; data.image_size=8"):
        Pretraining(settings, larger)
