"""Features of image files, by whatever network, into a file: batch after batch goes to disk, and a stopped run goes
on from there."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.eval.config import EmbedConfig
from gradmix.eval.features.cache import weights_key
from gradmix.eval.features.embeddings import Embeddings, embeddings
from gradmix.eval.features.extraction import Model, looked_at
from gradmix.eval.features.formats import Row, beside, is_ours, write_embeddings, write_table
from gradmix.ssl.config import EncoderConfig, flat
from gradmix.ssl.data.listing import Files
from gradmix.ssl.data.sizes import sample_sizes, usual_image_size
from gradmix.ssl.machine import pick_device
from gradmix.ssl.networks.backbones import Backbone, build_backbone
from gradmix.ssl.networks.timm_encoders import PREFIX, PRETRAINED, own_image_size
from gradmix.ssl.runs.parts import add_files, opened


@dataclass(frozen=True)
class Embedder:
    """A frozen network, and its projection head where it has one.

    Attributes:
        widths: F of the features, and D of the projections (0 without a head).
    """

    backbone: Backbone
    head: nn.Module | None
    widths: tuple[int, int]
    device: str

    @torch.inference_mode()
    def look(self, images: Tensor) -> Tensor:
        """``[n, 3, S, S]`` uint8 to features and L2-normalised projections side by side, ``[n, F + D]`` on the CPU."""
        features = self.backbone(images.to(self.device)).float()
        parts = [features] if self.head is None else [features, F.normalize(self.head(features), dim=1)]
        return torch.cat(parts, dim=1).cpu()

    def decode(self, image: Any) -> Tensor | str:
        """A file, PIL image or array to ``[3, S, S]`` uint8, or to the reason why it can't be read."""
        try:
            return self.backbone.transform(image)
        except ValueError as error:
            return str(error)


def find_embedder(config: EmbedConfig, files: Sequence[str]) -> Embedder:
    """
    Args:
        files: what is to be embedded; the image size of a checkpoint follows them, unless it is given.

    Raises:
        ValueError: no network, or two, are asked for; or it can't be had.
    """
    device = pick_device(config.device)
    if (config.run is None) == (config.checkpoint is None):
        raise ValueError("run: missing; give run=DIR, or checkpoint=FILE with encoder=NAME")
    if config.run is not None:
        folder = Path(config.run).expanduser()
        if not (folder / "backbone.safetensors").is_file():
            raise ValueError(
                f"run: {folder} is no finished run's folder and no detector's, backbone.safetensors is missing"
            )
        usual = flat(asdict(EmbedConfig()))
        for key, value in flat(asdict(config)).items():
            if value != usual[key] and key.startswith(("image_size", "fit", "encoder.")):
                name = key.removesuffix(".name")
                raise ValueError(f"{name}: belongs to checkpoint=FILE; run= has a network with its own, leave it out")
        model = Model(folder, device)
        return Embedder(
            model.backbone, model.head, (model.widths["features"], model.widths.get("projections", 0)), device
        )
    assert config.checkpoint is not None
    asked = config.encoder
    if not asked.name:
        raise ValueError("encoder: missing; checkpoint= needs it, encoder=NAME")
    if config.image_size is None and config.checkpoint == PRETRAINED and asked.name.startswith(PREFIX):
        size = own_image_size(asked.name)
    else:
        size = config.image_size or usual_image_size(sample_sizes(files))
    weights = str(Path(config.checkpoint).expanduser())
    encoder = build_backbone(EncoderConfig(asked.name, asked.width, asked.stem, weights, asked.part), size)
    return Embedder(Backbone(encoder, size, config.fit).to(device), None, (encoder.num_features, 0), device)


class Done(NamedTuple):
    """How far a part is: images looked at, those among them that could be read, bytes of the table."""

    images: int = 0
    readable: int = 0
    end: int = 0


def embed_files(
    embedder: Embedder, paths: Files, out: Path, root: Path, batch_size: int = 256, progress: bool = False
) -> Done:
    """Write the features of image files to ``out``; see :mod:`gradmix.eval.features.formats`.

    Every batch is forced to disk: its features in ``OUT.KEY.part``, a line for each image in ``OUT.KEY.part.rows``; KEY
    stands for network, images and batch size. A part of the same key is gone on with after its last whole batch:
    then the bytes are those of a run that was never stopped (a feature's last digits depend on what else is in its
    batch). Files that can't be read are left out, and listed with the reason in ``NAME.unreadable.csv``.

    Args:
        root: what was asked for; an image's label is the first folder below it, see :func:`label_of`.

    Raises:
        ValueError: another process is writing the same, or no file can be read.
        OSError: ``out`` can't be written.
    """
    part = out.with_name(f"{out.name}.{embedding_key(embedder, paths, batch_size)}.part")
    folder = root if root.is_dir() else None
    lines, width = part.with_name(f"{part.name}.rows"), sum(embedder.widths)
    for other in sorted(set(out.parent.glob(f"{escape(out.name)}.*.part")) - {part}):
        print(f"{other}: left alone; it is of another network, other images or another batch_size")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with opened(part) as file, open(lines, "a+b") as table:
            there = os.fstat(file.fileno()).st_size // (4 * width)
            done = whole_batches(table, len(paths), batch_size, there)
            if done.images:
                print(f"{part}: {done.images} of {len(paths)} images are embedded already")
            file.truncate(done.readable * width * 4)
            table.truncate(done.end)
            try:
                rest = Files(paths.array[done.images :])
                names = iter(rest)
                for batch, features in looked_at(rest, embedder.decode, embedder.look, batch_size, progress):
                    if features is not None:
                        file.write(features.numpy().astype("<f4", copy=False).tobytes())
                    pairs = zip(islice(names, len(batch)), map(why_not, batch), strict=True)
                    text = "".join(json.dumps([path, label_of(path, folder), error]) + "\n" for path, error in pairs)
                    to_disk(file)
                    table.write(text.encode())  # no line without its features
                    to_disk(table)
                    read = 0 if features is None else len(features)
                    done = Done(done.images + len(batch), done.readable + read, done.end + len(text))
                finish(out, part, lines, embedder.widths, done)
            except BaseException:  # of Ctrl-C and SIGTERM too
                if done.images and part.exists():
                    kept = f"{done.images} of {len(paths)} images are embedded"
                    print(f"{part}: {kept}; the same command goes on after them", file=sys.stderr)
                raise
            finally:
                if not done.images:
                    lines.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{out}: can't be written ({error.strerror or error})") from error
    return done


def embed_images(embedder: Embedder, images: Sequence[Any], folder: Path | None, batch_size: int = 256) -> Embeddings:
    """The same in memory, of files, PIL images or arrays.

    Raises:
        ValueError: an image can't be read.
    """
    parts: list[np.ndarray] = []
    for batch, features in looked_at(images, embedder.decode, embedder.look, batch_size):
        if bad := next(filter(None, map(why_not, batch)), ""):
            raise ValueError(f"images: {bad}")
        assert features is not None
        parts.append(features.numpy())
    matrix, width = np.concatenate(parts), embedder.widths[0]
    files = all(isinstance(image, str | Path) for image in images)
    paths = [str(image) if files else f"image {number}" for number, image in enumerate(images)]
    labels = np.array([label_of(path, folder) for path in paths]) if files else None
    return embeddings(matrix[:, :width], labels, paths, matrix[:, width:] if embedder.head is not None else None)


def finish(out: Path, part: Path, lines: Path, widths: tuple[int, int], done: Done) -> None:
    """Make the whole part ``out`` and remove it.

    Raises:
        ValueError: no file could be read.
    """
    bad = [(path, error) for path, _, error in told(lines) if error]
    if not done.readable:
        part.unlink()
        lines.unlink()
        raise ValueError(f"images: none of {done.images} files can be read ({bad[0][1]})")
    matrix = np.memmap(part, "<f4", "r", shape=(done.readable, sum(widths)))
    unreadable = beside(out)["unreadable"]
    if bad:
        write_table(unreadable, ("path", "error"), bad)
    else:
        unreadable.unlink(missing_ok=True)
    write_embeddings(out, matrix, widths, lambda: (Row(path, label) for path, label, error in told(lines) if not error))
    part.unlink()
    lines.unlink()


def check_replaceable(out: Path) -> None:
    """
    Raises:
        ValueError: ``out``, or a file that would be written beside it, is there and of someone else.
    """
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; give a file, such as {out / 'features.npy'}")
    wrong = [path for path in (*beside(out).values(), out) if path.exists() and not is_ours(path)]
    if wrong:
        raise ValueError(f"out: {wrong[0]} is there already and was not written by gradmix-embed; give another name")


def embedding_key(embedder: Embedder, paths: Sequence[str], batch_size: int) -> str:
    """Eight digits that change with network, image size, batch size, device and images (name, size, time of change)."""
    backbone = embedder.backbone
    keys = [weights_key(part) for part in (backbone, embedder.head) if part is not None]
    about = [*keys, backbone.image_size, backbone.fit, backbone.encoder.constants, batch_size, embedder.device]
    digest = hashlib.sha256(json.dumps(about).encode())
    add_files(digest, paths)
    return digest.hexdigest()[:8]


def label_of(path: str, folder: Path | None) -> str:
    """The first folder below ``folder`` on the way to a file; without it, the one that the file is in. May be empty."""
    if folder is None:
        return Path(path).parent.name
    inside = Path(path).relative_to(folder).parts
    return inside[0] if len(inside) > 1 else ""


def whole_batches(table: BinaryIO, images: int, batch_size: int, there: int) -> Done:
    """The whole batches that a part's lines tell of, as far as the features of so many images are ``there``."""
    table.seek(0)
    now = whole = Done()
    with suppress(ValueError):  # no JSON: the machine was killed here
        for line in table:
            if not line.endswith(b"\n"):
                break
            now = Done(now.images + 1, now.readable + (not json.loads(line)[2]), now.end + len(line))
            if now.readable <= there and (now.images % batch_size == 0 or now.images == images):
                whole = now
    return whole


def to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def told(lines: Path) -> Iterator[tuple[str, str, str]]:
    """Path, label and error of each image."""
    with open(lines, "rb") as file:
        for line in file:
            path, label, error = json.loads(line)
            yield path, label, error


def why_not(image: Tensor | str) -> str:
    return image if isinstance(image, str) else ""
