import io
import tarfile

import datasets
import pytest
import torch
from PIL import Image

from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import open_data
from tokenprune.evals.ranks import Ranks


def to_tensor(picture):
    return torch.tensor(list(picture.convert("RGB").resize((2, 2)).tobytes())).view(2, 2, 3).permute(2, 0, 1) / 255


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["cat", "dog", "eel"]):
        (tmp_path / name / "deep").mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (5, 4), (100 * number, index, 0)).save(tmp_path / name / f"{index}.png")
        Image.new("RGB", (5, 4), (100 * number, 9, 0)).save(tmp_path / name / "deep" / "x.JPG")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    return tmp_path


def read(data, **options):
    batches = list(data.batches(2, **options))
    labels = None if batches[0][1] is None else torch.cat([label for _, label in batches]).tolist()
    return torch.cat([images for images, _ in batches]), labels


def test_folder_has_a_class_for_each_subfolder_in_order(folder):
    data = open_data(folder, to_tensor)
    images, labels = read(data)
    assert (data.size, data.classes) == (9, 3)
    assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (images[:, 0, 0, 0] * 255).round().div(100).round().int().tolist() == labels


def test_folder_of_pictures_has_no_labels(folder):
    images, labels = read(open_data(folder / "cat", to_tensor))
    assert labels is not None or len(images) == 3
    flat = open_data(folder / "cat" / "deep", to_tensor)
    assert (flat.size, flat.classes) == (1, None)
    assert next(flat.batches(4))[1] is None


def test_classes_must_fit_the_model(folder):
    with pytest.raises(TokenPruneError, match="3 classes and the model 10"):
        open_data(folder, to_tensor, num_classes=10)
    assert open_data(folder, to_tensor, num_classes=3).size == 9


def test_wordnet_folders_are_numbered_as_in_imagenet(tmp_path):
    for name in ("n01443537", "n15075141"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    data = open_data(tmp_path, to_tensor, num_classes=1000)
    assert read(data)[1] == [1, 999]
    (tmp_path / "my_cats").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "my_cats" / "a.png")
    with pytest.raises(TokenPruneError, match="my_cats"):
        open_data(tmp_path, to_tensor, num_classes=1000)


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(TokenPruneError, match="no pictures"):
        open_data(tmp_path, to_tensor)


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read(open_data(tmp_path, to_tensor))[0] == 1).all()


def test_labels_are_whole_numbers_in_whatever_holds_them():
    images = torch.rand(3, 3, 4, 4)
    for labels in ([2, 0, 1], (2, 0, 1), torch.tensor([2, 0, 1], dtype=torch.uint8)):
        data = open_data((images, labels))
        assert (data.classes, read(data)[1]) == (3, [2, 0, 1])
    maps = torch.ones(3, 4, 4, dtype=torch.uint8)
    assert open_data((images, maps)).by_number()[0][1].dtype == torch.long
    for labels in (torch.tensor([0.7, 1.2, 2.0]), ["a", "b", "c"], [[1], [1, 2], []]):
        with pytest.raises(TokenPruneError, match="labels are to be"):
            open_data((images, labels))
    for pair in ((), (images,), (images, None, None), [1, 2]):
        with pytest.raises(TokenPruneError, match="a pair of two tensors"):
            open_data(pair)


def test_a_split_of_a_folder_of_pictures_is_refused(folder):
    with pytest.raises(TokenPruneError, match=r"split='val': .* no splits"):
        open_data(folder, to_tensor, split="val")


def test_tensors_with_and_without_labels():
    images = torch.rand(5, 3, 2, 2)
    seen, labels = read(open_data((images, torch.tensor([3, 1, 2, 0, 1]))))
    assert torch.equal(seen, images)
    assert labels == [3, 1, 2, 0, 1]
    assert read(open_data(images))[1] is None
    with pytest.raises(TokenPruneError, match="5 images and 4 labels"):
        open_data((images, torch.zeros(4)))


def test_loaded_hugging_face_data_set():
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {"picture": [Image.new("RGB", (3, 3), (50 * i, 0, 0)) for i in range(3)], "kind": [1, 0, 1]}
    data = open_data(datasets.Dataset.from_dict(rows, features=features), to_tensor)
    images, labels = read(data)
    assert data.classes == 2
    assert labels == [1, 0, 1]
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 50, 100]
    without = datasets.Dataset.from_dict({"text": ["x"]})
    with pytest.raises(TokenPruneError, match="no image column"):
        open_data(without, to_tensor)


def test_a_name_that_cannot_be_loaded_is_one_clear_error(monkeypatch):

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(TokenPruneError, match=r"some/name .*no network"):
        open_data("some/name", to_tensor)


def test_the_split_is_validation_or_test_by_default(monkeypatch):
    loaded = []
    rows = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (3, 3))]}, features=datasets.Features({"image": datasets.Image()})
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: loaded.append(split) or rows)
    open_data("a/b", to_tensor)
    open_data("a/b", to_tensor, split="train")
    assert loaded == ["test", "train"]


def test_a_subset_depends_on_the_seed_alone():
    data = open_data(torch.arange(50.0).view(50, 1, 1, 1))
    first = torch.cat([images for images, _ in data.batches(3, samples=10, seed=1)])
    again = torch.cat([images for images, _ in data.batches(7, samples=10, seed=1)])
    other = torch.cat([images for images, _ in data.batches(3, samples=10, seed=2)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.flatten().tolist() == data.chosen(10, 1).tolist()
    assert len(torch.cat([images for images, _ in data.batches(8)])) == 50


def test_reading_leaves_the_global_rng_alone():
    before = torch.get_rng_state()
    read(open_data(torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(0))), samples=3)
    assert torch.equal(before, torch.get_rng_state())


def coloured(count):
    return [Image.new("RGB", (3, 3), (20 * i, 0, 0)) for i in range(count)]


def rows_of(count):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": coloured(count), "label": [i % 2 for i in range(count)]}, features)


def seen(data, **options):
    images, labels = read(data, **options)
    return (images[:, 0, 0, 0] * 255 / 20).round().int().tolist(), labels


def test_a_saved_data_set_is_no_folder_of_pictures(tmp_path):
    rows_of(5).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows_of(2), "test": rows_of(3)}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    rows_of(4).to_parquet(tmp_path / "parquet" / "test-00000.parquet")
    assert seen(open_data(tmp_path / "one", to_tensor)) == ([0, 1, 2, 3, 4], [0, 1, 0, 1, 0])
    assert open_data(str(tmp_path / "splits"), to_tensor).size == 3
    assert open_data(tmp_path / "splits", to_tensor, split="train").size == 2
    assert seen(open_data(tmp_path / "parquet", to_tensor))[0] == [0, 1, 2, 3]
    with pytest.raises(TokenPruneError, match="validate"):
        open_data(tmp_path / "splits", to_tensor, split="validate")


def test_a_stream_is_read_in_order_and_as_far_as_asked(tmp_path):
    (tmp_path / "parquet").mkdir()
    rows_of(7).to_parquet(tmp_path / "parquet" / "test-00000.parquet")
    streams = [open_data(rows_of(7).to_iterable_dataset(), to_tensor)]
    streams.append(open_data(f"stream:{tmp_path / 'parquet'}", to_tensor))
    for data in streams:
        assert data.classes == 2
        for workers in (0, 2):
            assert seen(data, samples=5, seed=3, workers=workers) == ([0, 1, 2, 3, 4], [0, 1, 0, 1, 0])
        assert seen(data, samples=2)[0] == [0, 1]
    with pytest.raises(TokenPruneError, match=r"ended after 7 of 9 images"):
        read(streams[0], samples=9)
    with pytest.raises(TokenPruneError, match="--samples"):
        read(streams[0])


def test_of_a_stream_each_process_decodes_whole_batches_of_its_own():
    decoded = []

    def noting(picture):
        decoded.append(picture.getpixel((0, 0))[0] // 20)
        return to_tensor(picture)

    data = open_data(rows_of(9).to_iterable_dataset(), noting)
    parts = []
    for rank in range(2):
        decoded.clear()
        batches = list(data.batches(2, samples=9, processes=Ranks(rank, 2)))
        parts.append(list(decoded))
        assert [len(images) for images, _ in batches] == [[2, 2, 1], [2, 2]][rank]
    assert parts == [[0, 1, 4, 5, 8], [2, 3, 6, 7]]


def tar(path, numbers, labelled=True):
    with tarfile.open(path, "w") as opened:
        for number in numbers:
            picture = io.BytesIO()
            Image.new("RGB", (3, 3), (20 * number, 0, 0)).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("cls", str(number % 3).encode())):
                if suffix == "png" or labelled:
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(content)
                    opened.addfile(member, io.BytesIO(content))


def test_the_tars_of_webdataset_are_read_by_timm(tmp_path):
    tar(tmp_path / "pictures-0001.tar", [3, 4])
    tar(tmp_path / "pictures-0000.tar", [0, 1, 2])
    data = open_data(tmp_path, to_tensor)
    assert (data.size, data.classes) == (5, 3)
    assert seen(data) == ([0, 1, 2, 3, 4], [0, 1, 2, 0, 1])
    assert seen(data, samples=4, workers=2)[0] == [0, 1, 2, 3]
    assert seen(open_data(tmp_path, to_tensor, split="pictures-000{1..1}.tar", num_classes=3)) == ([3, 4], [0, 1])
    assert open_data(tmp_path, to_tensor, num_classes=10).classes == 10
    with pytest.raises(TokenPruneError, match="3 classes and the model 2"):
        open_data(tmp_path, to_tensor, num_classes=2)


def test_tars_that_cannot_be_evaluated_on_are_told(tmp_path):
    tar(tmp_path / "a.tar", [0, 1], labelled=False)
    with pytest.raises(TokenPruneError, match="2 pictures and 0 labels"):
        open_data(tmp_path, to_tensor)
    tar(tmp_path / "b.tar", [2])
    with pytest.raises(TokenPruneError, match="3 pictures and 1 labels"):
        open_data(tmp_path, to_tensor)
    tar(tmp_path / "c.tar", [])
    with pytest.raises(TokenPruneError, match="no pictures"):
        open_data(tmp_path, to_tensor, split="c.tar")
    with pytest.raises(TokenPruneError, match="val"):
        open_data(tmp_path, to_tensor, split="val")
    (tmp_path / "d.tar").write_bytes(b"no tar")
    with pytest.raises(TokenPruneError, match="cannot be read"):
        open_data(tmp_path, to_tensor)
