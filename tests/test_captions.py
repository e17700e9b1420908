"""Captioned pictures as people keep them, and what is said of those that are not right."""

import io
import json
import pickle
import tarfile
import unicodedata

import numpy as np
import pytest

from dico_jax.data.bad_examples import BadExampleLog
from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.errors import UsageError
from tests.test_sources import encoded, label_feature, open_source, prepare_dataset

NAMES = ("a.png", "sub/b.jpg", "c.webp")
TEXTS = {"a.png": ["a red bus", "a bus"], "sub/b.jpg": ["Straße 🚌 東京"], "c.webp": ["food, hot"]}
EMOJI = "👩‍🚀 on the moon, луна, القمر"


def write(folder, files):
    """Files by name: bytes, texts or what JSON takes."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content, ensure_ascii=False)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pictures(*names):
    return {name: encoded(i) for i, name in enumerate(names)}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "pictures", pictures(*NAMES))


def read(folder, captions=None, **fields):
    captions = None if captions is None else str(captions)
    return open_source("captions", path=str(folder), captions=captions, **fields)


def told(source):
    return {source.example_id(i): source[i]["captions"] for i in range(len(source))}


def rows(key="file_name", caption="text"):
    return [{key: name, caption: text} for name in NAMES for text in TEXTS[name]]


def lines(values):
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


def table(head, mark=","):
    body = [f'{row["file_name"]}{mark}"{row["text"]}"' for row in rows()]
    return "\r\n".join([head, *body]) + "\r\n"


def coco(file_name=str):
    images = [{"id": 10 - i, "file_name": file_name(name)} for i, name in enumerate(NAMES)]
    pairs = [(10 - i, text) for i, name in enumerate(NAMES) for text in TEXTS[name]]
    said = [{"id": i, "image_id": n, "caption": text} for i, (n, text) in enumerate(pairs)]
    return {"info": {}, "licenses": [], "images": images, "annotations": said[::-1]}


def karpathy(splits=("train", "train", "train")):
    def row(name, split):
        said = [{"raw": text, "tokens": text.split(), "sentid": 7} for text in TEXTS[name]]
        above, _, file = f"pictures/{name}".rpartition("/")
        return {"filepath": above, "filename": file, "split": split, "sentences": said, "cocoid": 1}

    return {"dataset": "coco", "images": [row(*p) for p in zip(NAMES, splits, strict=True)]}


FORMATS = {
    "mapping.json": TEXTS,
    "one_each.json": {n: t[0] if len(t) == 1 else t for n, t in TEXTS.items()},
    "kohya.json": {n.rpartition(".")[0]: {"caption": t, "tags": "x"} for n, t in TEXTS.items()},
    "list.json": rows(),
    "blip.json": [{"image": n, "caption": t, "image_id": 3} for n, t in TEXTS.items()],
    "lines.jsonl": lines(rows()) + "\n\n",
    "lines.json": lines(rows("path", "caption")),
    "coco.json": coco(),
    "karpathy.json": karpathy(),
    "flickr.csv": table("image,caption"),
    "excel.csv": table("Image; Caption", ";").encode("utf-8-sig"),
    "kaggle.csv": table("image_name| comment", "|"),
    "tabs.tsv": table("filename\ttext", "\t"),
    "windows.tsv": table("filename\ttext", "\t").encode("utf-16"),
    "captions.txt": table("image,caption"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_annotation_files(folder, name):
    write(folder.parent, {name: FORMATS[name]})
    source = read(folder, folder.parent / name)
    assert told(source) == {name: TEXTS[name] for name in sorted(NAMES)}
    assert source.kind == "pictures"
    assert (source.class_names, source.skipped) == ([], {})
    assert source[0] == {"image": encoded(0), "captions": TEXTS["a.png"]}
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    assert list(copy) == list(source)


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT"])
def test_texts_beside_pictures(folder, suffix):
    texts = {f"{n.rpartition('.')[0]}{suffix}": "\r\n".join(t) for n, t in TEXTS.items()}
    source = read(write(folder, texts | {"README.txt": "of these", ".hidden.txt": "no"}))
    assert told(source) == {name: TEXTS[name] for name in sorted(NAMES)}
    assert not source.skipped


def test_a_text_may_keep_the_suffix_and_any_mark_of_unicode(folder):
    said = "one \u2028 caption \x85 here\n\ufeffa second"
    source = read(write(folder, {f"{n}.txt": said.encode("utf-8-sig") for n in NAMES}))
    assert told(source)["a.png"] == ["one caption here", "\ufeffa second"]


def test_folders_of_hugging_face(tmp_path):
    there = write(tmp_path, pictures("train/1.png", "train/2.png", "val/1.png"))
    write(there, {
        "train/metadata.jsonl": lines([{"file_name": f"{i}.png", "text": str(i)} for i in (1, 2)]),
        "val/metadata.csv": "file_name,text\n1.png,v\n",
    })  # fmt: skip
    assert told(read(there)) == {"train/1.png": ["1"], "train/2.png": ["2"], "val/1.png": ["v"]}


def test_splits_of_karpathy(folder):
    file = write(folder.parent, {"k.json": karpathy(("train", "restval", "test"))}) / "k.json"
    for split, names in {"train": {"a.png"}, "train+restval": {"a.png", "sub/b.jpg"}}.items():
        source = read(folder, file, split=split)
        assert told(source).keys() == names
        assert not source.skipped  # the others are of another split
    with pytest.raises(UsageError, match="^data.split='val' is not in .* restval, test, train,"):
        read(folder, file, split="val")


def test_a_folder_above_or_below_the_names(tmp_path):
    """COCO's names are bare, Karpathy's and BLIP's start with the folder, others are absolute."""
    there = write(tmp_path / "coco", pictures("train2014/1.jpg", "train2014/2.jpg"))
    names = ["{}", "train2014/{}", "./train2014\\{}", "C:\\me\\coco\\train2014\\{}"]
    names += ["/home/me/coco/train2014/{}"]
    for name in names:
        file = {"c.json": {name.format(f"{i}.jpg"): "x" for i in (1, 2)}}
        for path in (there, there / "train2014"):
            source = read(path, write(tmp_path, file) / "c.json")
            assert (len(source), source.skipped) == (2, {}), (name, path)


def test_names_are_not_taken_for_those_of_another_folder(tmp_path):
    there = write(tmp_path / "x", pictures("cat/1.png", "cat/2.png", "dog/2.png"))
    said = {"cat/1.png": "a", "dog/1.png": "b", "2.png": "c"}
    source = read(there, write(tmp_path, {"c.json": said}) / "c.json")
    assert told(source) == {"cat/1.png": ["a"]}
    assert source.skipped.keys() == {"dog/1.png", "2.png", "cat/2.png", "dog/2.png"}
    source = read(there / "cat", tmp_path / "c.json")
    assert told(source) == {"1.png": ["a"], "2.png": ["c"]}


def test_names_in_another_normal_form_and_twice(tmp_path):
    composed, parted = (unicodedata.normalize(form, "Ångström é.png") for form in ("NFC", "NFD"))
    there = write(tmp_path / "x", pictures(parted))
    file = write(tmp_path, {"c.jsonl": lines([{"file": composed, "text": t} for t in "ab"])})
    assert told(read(there, file / "c.jsonl")) == {parted: ["a", "b"]}
    file = write(tmp_path, {"c.json": {composed: "a", f"./{parted}": "b"}})
    assert told(read(there, file / "c.json")) == {parted: ["a", "b"]}


def test_what_does_not_fit_is_counted_and_listed(folder, tmp_path):
    said = {"a.png": "x", "sub/b.jpg": [" ", ""], "gone.png": "y", "gone\n2.png": "z"}
    source = read(folder, write(tmp_path, {"c.json": said}) / "c.json")
    assert told(source) == {"a.png": ["x"]}
    bare, gone = "it has no caption", "there is no such picture"
    assert source.skipped == {
        "c.webp": bare, "gone\\n2.png": gone, "gone.png": gone, "sub/b.jpg": bare,
    }  # fmt: skip
    reader = PictureReader(8, 3)
    log = BadExampleLog(source, reader, 0.8, tmp_path / "bad.jsonl")
    assert log.bad == source.skipped
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 4
    with pytest.raises(UsageError, match=r"=0.7: 4 of 5 examples cannot be read \(.*no caption"):
        BadExampleLog(source, reader, 0.7)


def test_texts_that_do_not_fit_are_listed(folder):
    files = {"a.txt": "x", "sub/b.txt": "caf\xe9".encode("latin-1"), "c.txt": "\n", "7.txt": "y"}
    source = read(write(folder, files))
    assert told(source) == {"a.png": ["x"]}
    assert source.skipped == {
        "sub/b.jpg": "its text is not UTF-8",
        "c.webp": "it has no caption",
        "7.txt": "there is no such picture",
    }


def test_long_captions_other_scripts_and_halves_of_characters(folder, tmp_path):
    long = "word " * 2000
    file = write(tmp_path, {"c.jsonl": '{"file": "a.png", "text": "\\ud83d a\\u0000b"}\n' + lines(
        [{"file": "sub/b.jpg", "text": EMOJI}, {"file": "c.webp", "text": long}]
    )})  # fmt: skip
    found = told(read(folder, file / "c.jsonl"))
    assert found == {"a.png": ["? a\0b"], "sub/b.jpg": [EMOJI], "c.webp": [long.strip()]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", json.dumps(coco())[:-40], "is damaged or cut short .*line 1 column .*: copy or"),
        ("c.json", "", "is damaged or cut short .Expecting value"),
        ("c.jsonl", lines(rows())[:-9], "is damaged or cut short .line 4: "),
        ("c.csv", table("image,caption")[:-5], "is damaged or cut short .unexpected end of data"),
        ("c.csv", 'image,caption\na.png,"x" y\n', "is damaged or cut short"),
        ("c.csv", "image,caption\na.png,hot, food\n", "line 2 has more fields, parted by ','"),
        ("c.csv", "a.png,a cat\nb.png,a dog\n", "row 1 has no file name: it has a.png, a cat, and"),
        ("c.csv", "image,words\na.png,a cat\n", "none of its rows has a caption: they have image"),
        ("c.csv", "file,text\na.png,caf\xe9\n".encode("latin-1"), "is not UTF-8: save it as that"),
        ("c.csv", b"file,text\na.png," + b"x" * 200_000, "cut short .field larger than"),
        ("c.json", "7", "has JSON of another shape .TypeError"),
        ("c.json", ["a.png", "b.png"], "has JSON of another shape .AttributeError: 'str' object"),
        ("c.json", {"a.png": 7}, "cannot be read: a caption is 7, not a text"),
        ("c.json", {"annotations": []}, "has JSON of another shape .KeyError: 'images'"),
        ("c.json", {"annotations": [{"image_id": 1, "bbox": []}], "images": []}, "KeyError: 'capt"),
        ("c.json", "[" * 100_000, "cannot be read: "),
        ("c.json", '{"a.png": ' * 50_000 + "1", "cannot be read: |cut short"),
        ("c.json", "9" * 10_000, "cannot be read: "),
        ("c.json", [{"file_name": 3, "text": "x"}], "row 1 has no file name: it has file_name, te"),
        ("c.parquet", b"PAR1", "captions are read from .json, .jsonl, .csv, .tsv, .txt"),
        ("gone/c.json", None, "cannot be read: FileNotFoundError"),
    ],
)  # fmt: skip
def test_annotation_files_that_are_refused(folder, name, content, message):
    file = folder.parent / name
    if content is not None:
        write(folder.parent, {name: content})
    with pytest.raises(UsageError, match=message) as caught:
        read(folder, file)
    assert str(caught.value).startswith(f"data.captions={str(file)!r}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "captions", "message"),
    [
        (
            {"x.json": {"other.png": "x"}},
            "x.json",
            "of its 3 pictures has a caption in .*other.png",
        ),
        ({"x.json": []}, "x.json", "none of its 3 pictures has a caption in"),
        ({"x.json": TEXTS}, None, r"none .* a .txt beside it.* \(data.captions=.*x.json\?\)"),
        ({"7.txt": "x"}, None, "none of its 3 pictures has a caption in a .txt beside it"),
    ],
)
def test_folders_without_captions_are_refused(folder, files, captions, message):
    write(folder, files)
    with pytest.raises(UsageError, match=message) as caught:
        read(folder, captions and folder / captions)
    assert str(caught.value).startswith(f"data.path={folder}: ")


def test_paths_that_are_refused(tmp_path):
    for name in ("captions", "tar"):
        with pytest.raises(UsageError, match="^data.path is not set"):
            open_source(name)
    with pytest.raises(UsageError, match="^data.path=.*/none: FileNotFoundError"):
        read(tmp_path / "none")
    with pytest.raises(UsageError, match="there are no pictures in it .0 other"):
        read(tmp_path)
    with pytest.raises(UsageError, match="there are no tar files: give their folder"):
        open_source("tar", path=str(tmp_path))


def write_tar(file, files, **options):
    with tarfile.open(file, "w", **options) as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


SHARD = {
    "./000.jpg": encoded(0), "./000.txt": "a cat\n", "./._000.jpg": b"x", "./._000.txt": "x",
    "./000.json": json.dumps({"caption": "a cat", "url": "http://x", "status": "success"}),
    "001.json": json.dumps({"caption": EMOJI, "width": 3}), "001.PNG": encoded(1),
    "dir/a.b.png": encoded(2), "dir/a.b.txt": "dots", "dir/a.b.cls": "7",
}  # fmt: skip


def test_tar_files(tmp_path):
    write_tar(tmp_path / "0.tar", SHARD)
    write_tar(tmp_path / "1.tar", {f"{'long' * 50}/x.png": encoded(3), f"{'long' * 50}/x.txt": "y"})
    source = open_source("tar", path=str(tmp_path))
    ids = ["0.tar/./000", "0.tar/001", "0.tar/dir/a.b", f"1.tar/{'long' * 50}/x"]
    said = [["a cat"], [EMOJI], ["dots"], ["y"]]
    assert told(source) == dict(zip(ids, said, strict=True))
    assert [e["image"] for e in source] == [encoded(i) for i in range(4)]
    assert not source.skipped
    copy = pickle.loads(pickle.dumps(source))
    assert (repr(copy), list(copy)) == (repr(source), list(source))
    assert len(open_source("tar", path=str(tmp_path / "[1-9]*.tar"))) == 1


def test_what_is_not_right_in_tar_files(tmp_path):
    files = {"1.png": encoded(1), "2.txt": "x", "3.png": encoded(3), "3.txt": " ", "5.json": "[",
             "5.png": encoded(5), "6.png": encoded(6), "6.txt": "six"}  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    source = open_source("tar", path=str(tmp_path))
    assert told(source) == {"0.tar/6": ["six"]}
    bare = dict.fromkeys(["0.tar/1", "0.tar/3", "0.tar/5"], "it has no caption")
    assert source.skipped == bare | {"0.tar/2": "it has no picture"}


@pytest.mark.parametrize("at", [512 * 5 + 100, 512 * 6, 512 * 7 + 20, 512 * 8 + 20, 512 * 8])
def test_tar_files_that_are_cut_short(tmp_path, at):
    """In a picture, between files, in a text and in a header: said, and what is whole is read."""
    files = {"0.png": encoded(0), "0.txt": "zero", "1.txt": "one", "1.png": encoded(1)}
    write_tar(tmp_path / "0.tar", files | {"2.png": encoded(2), "2.txt": "two"})
    whole = (tmp_path / "0.tar").read_bytes()
    assert len(encoded(1)) < 512  # a header and a block for each
    (tmp_path / "0.tar").write_bytes(whole[:at])
    source = open_source("tar", path=str(tmp_path))
    assert source.skipped["0.tar"].startswith("not all of it can be read: ")
    good, bad = 0, []
    for index in range(len(source)):
        try:
            assert source[index]["image"] == encoded(index)
            good += 1
        except BadExample as error:
            bad.append(str(error))
    assert bad in ([], ["its tar file is cut short"])
    assert good == (2 if at >= 512 * 8 else 1)


def test_files_that_are_no_tar_files(tmp_path):
    write_tar(tmp_path / "0.tar", SHARD)
    (tmp_path / "1.tar").write_bytes(b"no tar file" * 100)
    (tmp_path / "2.tar").write_bytes(b"")
    source = open_source("tar", path=str(tmp_path))
    assert (len(source), source.skipped.keys()) == (3, {"1.tar", "2.tar"})
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UsageError, match="no tar file there has KEY.jpg and KEY.txt .*1.tar: not"):
        open_source("tar", path=str(tmp_path))


@pytest.fixture(scope="module")
def coco_captions(tmp_path_factory):
    """A small one of TFDS's coco_captions, with its features."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    part = {"text": np.str_, "id": np.int64}
    boxes = {"bbox": tfds.features.BBoxFeature(), "label": label_feature(), "is_crowd": np.bool_}
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"), "image/id": np.int64,
        "image/filename": tfds.features.Text(), "objects": tfds.features.Sequence(boxes),
        "captions": tfds.features.Sequence(part),
    }  # fmt: skip
    said = [["x"], ["y"], ["a bus", " "], ["Straße 🚌", "a road", "b"], [""], ["one"]]
    examples = [
        {"image": io.BytesIO(encoded(i)), "image/id": i, "image/filename": f"{i}.jpg",
         "objects": [], "captions": [{"text": t, "id": 9} for t in texts]}
        for i, texts in enumerate(said)
    ]  # fmt: skip
    prepare_dataset(data_dir, "coco_captions", features, examples)
    versions = data_dir / "coco_captions"
    (versions / "2014").mkdir()  # the name of its configuration
    (versions / "1.0.0").rename(versions / "2014" / "1.0.0")
    plain = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    examples = [{"image": io.BytesIO(encoded(i)), "caption": f"no {i}"} for i in range(4)]
    prepare_dataset(data_dir, "plain", plain, examples)
    return data_dir


def test_coco_captions_of_tfds(coco_captions):
    source = open_source("tfds", path=str(coco_captions), name="coco_captions")
    found, bad = {}, {}
    for index in range(len(source)):
        name = source.example_id(index)
        try:
            found[name] = source[index]
        except BadExample as error:
            bad[name] = str(error)
    assert bad == {"4.jpg": "it has no caption"}
    assert source.class_names == []
    said = {name: example["captions"] for name, example in found.items()}
    assert said == {"2.jpg": ["a bus"], "3.jpg": ["Straße 🚌", "a road", "b"], "5.jpg": ["one"]}
    assert found["3.jpg"]["image"] == encoded(3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.example_id(0) == source.example_id(0)


def test_other_captions_of_tfds(coco_captions):
    source = open_source("tfds", path=str(coco_captions), name="plain", split="test")
    assert sorted(e["captions"] for e in source) == [["no 0"], ["no 1"]]
    assert source.example_id(0) == "test/0"


def test_worded_digits():
    source = open_source("worded_digits")
    assert (len(source), len(source[7]["captions"])) == (1797, 5)
    assert all("seven" in caption for caption in source[7]["captions"])
