import pytest
import torch

from gradmix.ssl.images import ImageSet
from gradmix.ssl.loader import TrainLoader, seed_of


def images(count=23, size=4):
    pixels = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, size, size).to(torch.uint8)
    return ImageSet(torch.arange(count), size, pixels.contiguous())


def indices(loader, epochs=1):
    return [(b.epoch, b.step, b.index.tolist()) for _ in range(epochs) for b in loader]


def test_an_epoch_is_a_permutation_without_the_incomplete_batch():
    loader = TrainLoader(images(), 5, seed=0)
    batches = list(loader)
    seen = torch.cat([b.index for b in batches])
    assert len(loader) == len(batches) == 4
    assert len(seen.unique()) == 20
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist() == batch.index.tolist()
    assert [b.step for b in batches] == [0, 1, 2, 3]


def test_epochs_differ_and_seeds_differ():
    first, second = (indices(TrainLoader(images(), 5, seed=0), 2)[i::4] for i in (0, 0))
    assert first == second
    epochs = indices(TrainLoader(images(), 20, seed=0), 2)
    assert epochs[0][2] != epochs[1][2]
    assert epochs[0][2] != indices(TrainLoader(images(), 20, seed=1))[0][2]


@pytest.mark.parametrize("stop", range(1, 8))
def test_goes_on_between_any_two_steps(stop):
    whole = indices(TrainLoader(images(), 5, seed=3), 2)
    loader, before = TrainLoader(images(), 5, seed=3), []
    while len(before) < stop:
        for batch in loader:
            before.append((batch.epoch, batch.step, batch.index.tolist()))
            if len(before) == stop:
                break
    again = TrainLoader(images(), 5, seed=3)
    again.load_state_dict(loader.state_dict())
    after = []
    while len(before) + len(after) < len(whole):
        after += indices(again)
    assert before + after == whole


def test_processes_share_each_batch_between_them():
    whole = list(TrainLoader(images(), 6, seed=1))
    shares = [list(TrainLoader(images(), 6, seed=1, rank=r, world_size=3)) for r in range(3)]
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
    expected = list(TrainLoader(stored, 4, seed=0))
    for workers in (0, 2):
        for got, want in zip(TrainLoader(on_disk, 4, seed=0, workers=workers), expected, strict=True):
            assert torch.equal(got.images, want.images)
            assert torch.equal(got.labels, want.labels)
            assert torch.equal(got.index, want.index)


def test_bad_batch_sizes():
    with pytest.raises(ValueError, match="larger than the training set"):
        TrainLoader(images(4), 5, seed=0)
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        TrainLoader(images(), 4, seed=0, world_size=3)


def test_seeds_of_neighbouring_places_differ():
    seeds = {seed_of(s, e, t, r) for s in range(4) for e in range(4) for t in range(4) for r in range(4)}
    assert len(seeds) == 256
    assert all(0 <= seed < 2**63 for seed in seeds)
