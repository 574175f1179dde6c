"""What gradmix-embed does: features of image files, by any network."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gradmix.eval.config import EmbedConfig
from gradmix.eval.counted import counted
from gradmix.eval.features.embed import Done, check_replaceable, embed_files, embed_images, find_embedder
from gradmix.eval.features.embeddings import Embeddings
from gradmix.eval.features.formats import beside, check_format, read_embeddings
from gradmix.eval.scoring.scorer import find_images
from gradmix.ssl.data.listing import Files
from gradmix.ssl.runs.outputs import check_output, check_writable


def run_embed(config: EmbedConfig) -> None:
    done = embed(config, progress=True)
    if bad := done.images - done.readable:
        told = beside(Path(config.out).expanduser())["unreadable"]
        raise ValueError(f"images: {bad} of {done.images} files can't be read, left out; {told} says why")


def embed(config: EmbedConfig, progress: bool = False) -> Done:
    """Write ``config.out``: how many images were looked at, and how many could be read."""
    out, images = Path(config.out).expanduser(), Path(config.images).expanduser()
    check_format(out)
    paths = Files(find_images(config.images))
    weights = [] if config.checkpoint is None else [Path(config.checkpoint).expanduser()]
    for path in (out, *beside(out).values()):
        check_output("out", path, chain(weights, paths), [images] if images.is_dir() else [])
    check_replaceable(out)
    check_writable("out", out.parent)
    embedder = find_embedder(config, paths)
    done = embed_files(embedder, paths, out, images, config.batch_size, progress)
    width, projected = embedder.widths
    heads = f", and {projected} projections" if projected else ""
    print(f"{out}: {counted(done.readable, 'image')}, {counted(width, 'feature')}{heads}")
    return done


def embedded(config: EmbedConfig, images: Sequence[Any] | None, write: bool) -> Embeddings:
    """For :func:`gradmix.embed`: features of every image.

    Args:
        images: instead of those that ``config.images`` names.
        write: whether to write ``config.out``.
    """
    if write and images is not None:
        raise ValueError("out: a list of images is embedded in memory; write the features that it gives yourself")
    if write:
        embed(config)
        return read_embeddings(Path(config.out).expanduser(), "out")
    folder = Path(config.images).expanduser()
    inside = folder if images is None and folder.is_dir() else None
    images = find_images(config.images) if images is None else images
    files = [str(image) for image in images if isinstance(image, str | Path)]
    return embed_images(find_embedder(config, files), images, inside, config.batch_size)
