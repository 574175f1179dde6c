"""Evaluating what was trained elsewhere, or on other data: a checkpoint becomes a run's folder, a run gets new data."""

from dataclasses import asdict, replace
from pathlib import Path

from gradmix.eval.config import EvalConfig
from gradmix.eval.features.feature_sets import FEATURES
from gradmix.ssl.config import Config, EncoderConfig, MethodConfig, MixConfig, OptimizerConfig, flat
from gradmix.ssl.data.open_set import OpenSetData, load_data
from gradmix.ssl.networks.backbones import Encoder, backbone_metadata, build_backbone
from gradmix.ssl.networks.timm_encoders import PREFIX, PRETRAINED, own_image_size
from gradmix.ssl.runs.files import write_json, write_tensors
from gradmix.ssl.runs.folder import claim

ELSEWHERE = "elsewhere"  # method.name of what was not trained here
READING = ("memory_gib", "on_bad_image", "workers")  # keys of data that say how images are read, not which


Foreign = tuple[Config, Encoder]  # a run that its folder does not hold yet


def read_foreign(config: EvalConfig) -> Foreign:
    """The run that ``checkpoint`` would be the backbone of, and that backbone; prints which weights were matched.

    Raises:
        ValueError: a key is missing, or the weights are unreadable or not the encoder's.
    """
    for key, value in (("encoder", config.encoder.name), ("data", config.data.name), ("out", config.out)):
        if not value:
            raise ValueError(f"{key}: missing; checkpoint= needs it, {key}={'DIR' if key == 'out' else 'NAME'}")
    assert config.checkpoint is not None and config.out is not None  # as the loop and find_run saw
    checkpoint, out = Path(config.checkpoint).expanduser(), Path(config.out).expanduser()
    asked, size = config.encoder, config.data.image_size
    encoder = EncoderConfig(asked.name, asked.width, asked.stem, init=str(checkpoint), part=asked.part)
    if size is None:
        own = config.checkpoint == PRETRAINED and asked.name.startswith(PREFIX)
        size = own_image_size(asked.name) if own else load_data(config.data, 0).train.size
        config.data = replace(config.data, image_size=size)
    backbone = build_backbone(encoder, size)
    encoder.width, encoder.stem = (backbone.description.get(key) for key in ("width", "stem"))
    method, mix, optimizer = MethodConfig(ELSEWHERE), MixConfig("none"), OptimizerConfig("unknown")
    run = Config(run_dir=str(out), data=config.data, encoder=encoder, method=method, mix=mix, optimizer=optimizer)
    return run, backbone


def adopt(run: Config, backbone: Encoder) -> None:
    """Make ``run.run_dir`` the folder of what :func:`read_foreign` read.

    Raises:
        ValueError: it belongs to another run.
    """
    out = Path(run.run_dir)
    claim(out, run, "out")
    assert run.data.image_size is not None  # chosen by read_foreign
    metadata = backbone_metadata(backbone, run.data.image_size, run.data.fit)
    write_tensors(out / "backbone.safetensors", backbone.state_dict(), metadata)
    write_json(out / "training.json", {"checkpoint": run.encoder.init})


def transfer(run: Config, config: EvalConfig) -> None:
    """Give a run the data of ``data=NAME``, as squares like those that the backbone was trained on; or its own data
    another way of reading them.

    Raises:
        ValueError: other keys of ``data`` without a name.
    """
    if config.data.name:
        run.data = replace(config.data, image_size=run.data.image_size, fit=run.data.fit)
        return
    usual = flat(asdict(EvalConfig().data))
    given = {key: value for key, value in flat(asdict(config.data)).items() if value != usual[key]}
    for key in given:
        if key not in READING:
            raise ValueError(f"data.{key}: needs data=NAME; root=PATH says where the run's own data lies now")
    run.data = replace(run.data, **given)


def check_transfer_classes(run: Config, data: OpenSetData) -> None:
    """Classes that only the test set has are the unknown ones; one that only the training set has is a mistake.

    Raises:
        ValueError: a known class has no test images.
    """
    if not data.classes:
        return
    tested = set(data.test.labels.tolist())
    absent = [name for label, name in enumerate(data.classes) if label not in tested]
    asked = run.data
    chosen = (
        asked.pseudo_unknown
        or asked.unknown_roots
        or any(x is not None for x in (asked.split, asked.known, asked.unknown_root))
    )
    extra = [] if chosen else data.unknown
    if absent:
        differences = [f"only the training set has {', '.join(absent)}"]
        differences += [f"only the test set has {', '.join(extra)}"] * bool(extra)
        raise ValueError(
            f"data.root: the classes of training and test set differ: {'; '.join(differences)}; "
            "data.known=[...] names the classes to evaluate, and all others are unknown"
        )


def features_run(config: EvalConfig) -> Config:
    """The config of a run that is nothing but features from elsewhere.

    Raises:
        ValueError: ``out`` is missing, or what needs images or a network is asked for.
    """
    if config.out is None:
        raise ValueError("out: missing; features= needs it, out=DIR")
    given = {
        "data": config.data.name, "root": config.root, "unknown_root": config.unknown_root, "export": config.export,
        "corruptions": config.corruptions, "against": config.against, "encoder": config.encoder.name,
        "data.split": config.data.split, "unknown_roots": config.unknown_roots,
        "data.unknown_root": config.data.unknown_root, "data.unknown_roots": config.data.unknown_roots,
    }  # fmt: skip
    for key, value in given.items():
        if value:
            raise ValueError(f"{key}: features= has no images and no network; leave it out")
    root = None if config.features is None else str(Path(config.features).expanduser())
    data = replace(config.data, name=FEATURES, root=root, image_size=1)
    encoder, method = EncoderConfig(FEATURES, width=None), MethodConfig(ELSEWHERE)
    out = str(Path(config.out).expanduser())
    return Config(
        run_dir=out,
        data=data,
        encoder=encoder,
        method=method,
        mix=MixConfig("none"),
        optimizer=OptimizerConfig("unknown"),
    )
