import pytest
import torch

from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import TrainLoader, check_batch_size, seed_of


def images(count=23, size=4):
    pixels = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, size, size).to(torch.uint8)
    return ImageSet(torch.arange(count), size, pixels.contiguous())


def loader(batch_size=5, seed=0, epochs=2, data=None, **options):
    return TrainLoader(images() if data is None else data, batch_size, seed, epochs, **options)


def places(loader):
    return [(batch.epoch, batch.step, batch.index.tolist()) for batch in loader]


def test_an_epoch_is_a_permutation_without_the_incomplete_batch():
    batches = list(loader(epochs=1))
    assert len(loader(epochs=1)) == len(batches) == 4
    assert len(torch.cat([b.index for b in batches]).unique()) == 20
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist() == batch.index.tolist()


def test_epochs_follow_each_other_and_differ_and_so_do_seeds():
    first = places(loader())
    assert first == places(loader())
    assert [(epoch, step) for epoch, step, _ in first] == [(e, s) for e in range(2) for s in range(4)]
    assert [i for *_, i in first[:4]] != [i for *_, i in first[4:]]
    assert first != places(loader(seed=1))


@pytest.mark.parametrize("start", range(9))
def test_goes_on_between_any_two_steps(start):
    rest = loader(start=start)
    assert len(rest) == 8 - start
    assert places(rest) == places(loader())[start:]


def test_processes_share_each_batch_between_them():
    whole = list(loader(6))
    shares = [list(loader(6, rank=r, world_size=3)) for r in range(3)]
    for step, batch in enumerate(whole):
        assert torch.cat([share[step].index for share in shares]).tolist() == batch.index.tolist()


def test_files_and_memory_give_the_same_batches_with_any_number_of_workers(tmp_path):
    from torchvision.io import write_png

    stored = images(12)
    files = []
    for i, image in enumerate(stored.images):
        write_png(image, str(tmp_path / f"{i}.png"))
        files.append(str(tmp_path / f"{i}.png"))
    on_disk = ImageSet(stored.labels, 4, files=files)
    expected = list(loader(4, data=stored, start=2))
    for workers in (0, 2):
        for got, want in zip(loader(4, data=on_disk, start=2, workers=workers), expected, strict=True):
            assert torch.equal(got.images, want.images)
            assert torch.equal(got.labels, want.labels)
            assert torch.equal(got.index, want.index)
            assert got[3:] == want[3:]


def test_bad_batch_sizes():
    with pytest.raises(ValueError, match="larger than the training set"):
        loader(5, data=images(4))
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        loader(4, world_size=3)
    with pytest.raises(ValueError, match="one image for each of 4 processes, and mixing takes two; try batch_size=8"):
        check_batch_size(4, 100, 4, mixes=True)
    check_batch_size(8, 100, 4, mixes=True)
    check_batch_size(4, 100, 4)


def test_seeds_of_neighbouring_places_differ():
    seeds = {seed_of(s, e, t, r) for s in range(4) for e in range(4) for t in range(4) for r in range(4)}
    assert len(seeds) == 256
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(3, 5) == seed_of(3, 5, 0) != seed_of(3, 5, 1)
