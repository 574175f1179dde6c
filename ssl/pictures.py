"""The picture of mixing that TensorBoard and the report show."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from gradmix.mixing import Mixed
from gradmix.ssl.data.images import Constants, denormalize

PADDING = 2  # pixels between two tiles


def mixing_picture(
    mixing: tuple[Tensor, Mixed] | None,
    constants: Constants,
    pairs: int = 8,
    disrupted: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """A grid ``[3, H, W]`` with rows: the other view, the view, its attribution map (if any), partner, mix; outlier.

    Args:
        mixing: views and what became of them, if any were mixed.
        disrupted: the first views, their maps, and the outliers made of them; few of them leave the row's end empty.
    """
    tiles, attribution = [], None if disrupted is None else disrupted[1]
    if mixing is None:
        assert disrupted is not None
        tiles.append(denormalize(disrupted[0][:pairs], constants))
    else:
        views, mixed = mixing
        batch = len(views) // 2
        rows = slice(0, min(pairs, batch))
        tiles += [denormalize(views[batch:][rows], constants), denormalize(views[rows], constants)]
        attribution = mixed.attribution[rows] if mixed.attribution is not None else attribution
    if attribution is not None:
        tiles.append(_filled(attribution[:pairs, None].expand(-1, 3, -1, -1), len(tiles[0])))
    if mixing is not None:
        tiles += [denormalize(views[mixed.partner[rows]], constants), denormalize(mixed.images[rows], constants)]
    if disrupted is not None:
        tiles.append(_filled(denormalize(disrupted[2][:pairs], constants), len(tiles[0])))
    picture = torch.cat([tile.float().cpu() for tile in tiles])
    picture = F.interpolate(picture, scale_factor=tile_side(picture.shape[-1]) // picture.shape[-1])
    return make_grid(picture, nrow=len(tiles[0]), padding=PADDING)


def tile_side(size: int) -> int:
    """Pixels of a tile's side in :func:`mixing_picture`: small images are enlarged, by a whole number."""
    return size * max(1, 64 // size)


def _filled(images: Tensor, count: int) -> Tensor:
    """The first ``count`` images, black ones for those that are missing."""
    return torch.cat([images[:count], images.new_zeros(max(0, count - len(images)), *images.shape[1:])])
