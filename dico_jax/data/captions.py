"""Sources of captioned pictures: annotation files, texts beside pictures, COCO's, tar shards."""

import concurrent.futures
import csv
import glob
import io
import itertools
import json
import os
import tarfile
import unicodedata
from collections.abc import Iterable
from typing import Any

from dico_jax.data import paths
from dico_jax.data.class_files import LISTERS, list_below
from dico_jax.data.pictures import BadExample
from dico_jax.errors import UsageError, one_line, shown

_TEXTS, _TABLES = (".txt", ".caption"), (".csv", ".tsv", ".txt")
_FILES = (".json", ".jsonl", *_TABLES)
_METADATA = ("metadata.jsonl", "metadata.csv")  # which Hugging Face's folders of images have
_NO_CAPTIONS = {"readme", "license", "licence"}  # texts that lie beside pictures as well
# What the picture and its captions are called, in JSON, in columns, in webdataset's .json.
_NAMES = ("file_name", "filename", "file", "image", "image_name", "image_path", "file_path", "path")
_CAPTIONS = ("captions", "caption", "text", "sentences", "raw", "comment", "prompt")
_BARE, _GONE = "it has no caption", "there is no such picture"

Captions = dict[str, list[str]]  # by name of a picture


class CaptionedFiles:
    """Pictures below a folder with the captions of each, by name: a `Source`.

    Examples are {"image": bytes, "captions": [text, ...]}. Pictures without a caption, and captions
    of what is not there, are `skipped`.
    """

    kind = "pictures"
    class_names: list[str]
    skipped: dict[str, str]

    def __init__(self, path: str | None, captions: str | None = None, split: str = "train"):
        """Reads the captions of the pictures in a folder.

        Args:
          path: the folder, local or gs://.
          captions: a file: JSON, JSON lines or CSV of names and captions, COCO's annotations,
            Karpathy's split of them. None: metadata.jsonl, or a .txt beside every picture.
          split: of Karpathy's file what is of these, such as "train" or "train+restval".
        """
        self.path, self.class_names = paths.required_path(path, "a folder of pictures"), []
        self._about = (captions, split) if captions else ()
        with paths.path_errors(self.path):
            files = sorted(list_below(self.path)[0])
        pictures, others = paths.picture_names(files), set[str]()
        if captions is None:
            said, self.skipped = _beside(self.path, files, pictures)
        else:
            (said, others), self.skipped = _read(captions, split, "data.captions"), {}
        places = _places(self.path, pictures, [*said, *others])
        found: Captions = {}
        for name, texts in said.items():
            if (place := places[name]) is None:
                self.skipped.setdefault(shown(name), _GONE)
            else:
                found.setdefault(place, []).extend(texts)
        self._names = [name for name in pictures if found.get(name)]
        self._captions = [found[name] for name in self._names]
        elsewhere = {places[name] for name in others}
        for name in pictures:
            if not found.get(name) and name not in elsewhere:
                self.skipped.setdefault(shown(name), _BARE)
        if not self._names:
            raise paths.wrong_path(self.path, self._nothing(captions, files, pictures))

    def _nothing(self, captions: str | None, files: list[str], pictures: list[str]) -> str:
        """What is said where no picture has a caption."""
        if not pictures:
            return f"there are no pictures in it ({len(files)} other files)"
        there = [shown(f) for f in files if f.lower().endswith(_FILES) and not f.endswith(".txt")]
        hint = f" (data.captions={os.path.join(self.path, there[0])}?)" if there else ""
        fix = f"a .txt beside it, and no {_METADATA[0]}: add them, or give data.captions{hint}"
        some = [f"{name}: {why}" for name, why in itertools.islice(self.skipped.items(), 2)]
        where = fix if captions is None else f"{captions} ({'; '.join(some)})"
        return f"none of its {len(pictures)} pictures has a caption in {where}"

    def __len__(self):
        return len(self._names)

    def __getitem__(self, index) -> dict[str, Any]:
        image = paths.read_file(os.path.join(self.path, self._names[index]))
        return {"image": image, "captions": list(self._captions[index])}

    def example_id(self, index) -> str:
        """The name of the file, as it can be printed."""
        return shown(self._names[index])

    def __repr__(self):
        return f"CaptionedFiles({', '.join(map(repr, (self.path, *self._about)))})"


class TarSource:
    """Pictures and captions in the tar files of a folder or pattern, as webdataset has them.

    Files of one name, KEY.jpg with KEY.txt or KEY.json, are an example; as in `CaptionedFiles`.
    """

    kind = "pictures"
    class_names: list[str]
    skipped: dict[str, str]

    def __init__(self, path: str | None):
        """Lists the files in all shards, whose headers are read once."""
        path = paths.required_path(path, "tar files of pictures and captions", local="Tar files")
        self.path, self.class_names, self.skipped = path, [], {}
        folder = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
        self._shards = sorted(glob.glob(folder))
        self._examples: list[tuple[int, str, tuple[int, int], list[str]]] = []
        if not self._shards:
            raise paths.wrong_path(path, "there are no tar files: give their folder or a pattern")
        for number, shard in enumerate(self._shards):
            with paths.path_errors(path):
                self._add(number, shard)
        if not self._examples:
            some = "; ".join(f"{n}: {why}" for n, why in [*self.skipped.items()][:2]) or "no files"
            what = f"no tar file there has KEY.jpg and KEY.txt or KEY.json in it ({some})"
            raise paths.wrong_path(path, what)

    def _add(self, number: int, shard: str) -> None:
        """Lists a shard; where it is cut, it has an end there."""
        parts: dict[str, dict[str, tarfile.TarInfo]] = {}
        name = os.path.basename(shard)
        with open(shard, "rb") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    for member in archive:
                        key, _, kind = member.name.rpartition(".")
                        hidden = any(map(paths.is_hidden, member.name.split("/")))
                        if member.isfile() and not hidden:
                            parts.setdefault(key, {})[f".{kind.lower()}"] = member
                    stream.seek(archive.offset)
                    if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("it is cut short")
            except tarfile.TarError as error:
                self.skipped[shown(name)] = f"not all of it can be read: {one_line(error)}"
            for key, files in parts.items():
                picture = next(iter(paths.picture_names(files)), None)
                texts = [c for kind, file in files.items() for c in _of_member(stream, kind, file)]
                if picture is None or not texts:
                    why = "it has no picture" if picture is None else _BARE
                    self.skipped[shown(f"{name}/{key}")] = why
                else:
                    place = files[picture].offset_data, files[picture].size
                    said = list(dict.fromkeys(texts))  # the .json often says the .txt again
                    self._examples.append((number, key, place, said))

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index) -> dict[str, Any]:
        number, _, (start, size), captions = self._examples[index]
        if size > paths.MAX_FILE_BYTES:
            raise BadExample(f"the file is larger than {paths.MAX_FILE_BYTES} bytes")
        with open(self._shards[number], "rb") as stream:
            stream.seek(start)
            if len(image := stream.read(size)) < size:
                raise BadExample("its tar file is cut short")
        return {"image": image, "captions": list(captions)}

    def example_id(self, index) -> str:
        """SHARD/KEY, as it can be printed."""
        number, key, *_ = self._examples[index]
        return shown(f"{os.path.basename(self._shards[number])}/{key}")

    def __repr__(self):
        return f"TarSource({self.path!r})"


def clean(captions: Iterable[str]) -> list[str]:
    """Those that are not empty, in one line each, without halves of characters."""
    whole = (caption.encode("utf-8", "replace").decode() for caption in captions)
    return [text for text in (" ".join(caption.split()) for caption in whole) if text]


def _of_member(stream: io.BufferedReader, kind: str, file: tarfile.TarInfo) -> list[str]:
    """The captions in a file of a tar file, if it is one that has some."""
    if kind not in (*_TEXTS, ".json") or file.size > 1 << 20:
        return []
    stream.seek(file.offset_data)
    if len(data := stream.read(file.size)) < file.size:
        return []
    try:
        text = _decoded(data)
        return clean(_lines(text)) if kind != ".json" else _said(json.loads(text))
    except (ValueError, RecursionError):
        return []


def _decoded(data: bytes) -> str:
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # as some programs of Windows write
    return data.decode("utf-16" if wide else "utf-8-sig")


def _lines(text: str) -> list[str]:
    return text.replace("\r", "\n").split("\n")  # splitlines would part captions, too


def _places(path: str, pictures: list[str], names: list[str]) -> dict[str, str | None]:
    """The picture that each name means, or None: it may have more folders, or fewer, or no suffix.

    It never means one of another folder, and none where two could be meant.
    """
    exact = {_plain(picture): picture for picture in pictures}
    above = f"/{os.path.basename(path.rstrip('/'))}/"
    spelt = {name: (_plain(name), f"/{_plain(name)}".rpartition(above)[2]) for name in names}
    found = {n: next((exact[s] for s in both if s in exact), None) for n, both in spelt.items()}
    ends: dict[str, str | None] = {}
    for plain, picture in exact.items() if None in found.values() else ():
        parts = plain.split("/")
        for end in ("/".join(parts[at:]) for at in range(len(parts))):
            for key in (end, end[: end.rfind(".")]):
                ends[key] = None if key in ends else picture
    for name in (name for name, place in found.items() if place is None):
        found[name] = next((ends[s] for s in spelt[name] if s in ends), None)
    return found


def _plain(name: str) -> str:
    """A name as it is the same on all systems."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _beside(path: str, files: list[str], pictures: list[str]) -> tuple[Captions, dict[str, str]]:
    """The captions of metadata.jsonl, and in texts beside pictures, and why some are skipped."""

    def read(name: str) -> tuple[list[str], str | None]:
        try:
            return clean(_lines(_decoded(paths.read_file(os.path.join(path, name))))), None
        except UnicodeDecodeError:
            return [], "its text is not UTF-8"
        except BadExample as error:
            return [], f"its text cannot be read: {error}"

    said: Captions = {}
    for name in files:
        if name.rpartition("/")[2] in _METADATA:
            above = name[: name.rfind("/") + 1]
            for picture, captions in read_captions(os.path.join(path, name)).items():
                said.setdefault(above + picture, []).extend(captions)
    texts = [name for name in files if name.lower().endswith(_TEXTS)]
    with concurrent.futures.ThreadPoolExecutor(LISTERS) as pool, paths.path_errors(path):
        contents = dict(zip(texts, pool.map(read, texts), strict=True))
    of: dict[str, list[str]] = {}  # pictures, by names without suffix
    for picture in pictures:
        for name in (picture, picture[: picture.rfind(".")]):
            of.setdefault(name, []).append(picture)
    skipped: dict[str, str] = {}
    for name, (captions, why) in contents.items():
        stem = name[: name.rfind(".")]
        if stem in of or os.path.basename(stem).lower() not in _NO_CAPTIONS:
            for picture in of.get(stem, [name]):
                said.setdefault(picture, []).extend(captions)
                skipped |= {shown(picture): why} if why else {}
    return said, skipped


def read_captions(file: str, split: str = "", field: str = "data.captions") -> Captions:
    """The captions in an annotation file, see `CaptionedFiles`; errors name the `field`."""
    return _read(file, split, field)[0]


def _read(file: str, split: str, field: str) -> tuple[Captions, set[str]]:
    """The captions in an annotation file, and the pictures of its other splits."""
    kind = os.path.splitext(file)[1].lower()
    if kind not in _FILES:
        raise UsageError(field, file, f": captions are read from {', '.join(_FILES)}")
    try:
        text = _decoded(paths.read_file(file))
        rows = _table(text, file) if kind in _TABLES else _json(text, kind == ".jsonl")
        return _of_rows(rows, split)
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(field, file, "is not UTF-8: save it as that") from error
    except (json.JSONDecodeError, csv.Error) as error:
        fix = f"is damaged or cut short ({one_line(error)}): copy or write it again"
        raise UsageError(field, file, fix) from error
    except (LookupError, TypeError, AttributeError) as error:
        what = one_line(f"{type(error).__name__}: {error}")[:200]
        raise UsageError(field, file, f"has JSON of another shape ({what})") from error
    except (BadExample, OSError, ValueError, RecursionError) as error:
        raise UsageError(field, file, f"cannot be read: {one_line(error)}") from error


def _json(text: str, is_lines: bool) -> Any:
    """The value in JSON, or the list of values in its lines."""
    if not is_lines:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(f"line {number}: {error.msg}", line, error.pos) from error
    return rows


def _table(text: str, file: str) -> list[dict[str, str]]:
    head = text.lstrip().partition("\n")[0]
    mark = max(",\t;|", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows = []
    for row in reader:
        if None in row:
            fix = "put captions with such a mark between double quotes"
            what = f"line {reader.line_num} has more fields, parted by {mark!r}, than the first one"
            raise ValueError(f"{what}: {fix}")
        rows.append(row)
    return rows


def _of_rows(rows: Any, split: str) -> tuple[Captions, set[str]]:
    found: Captions = {}
    others: set[str] = set()
    if isinstance(rows, dict) and "annotations" in rows:  # COCO's own
        files = {image["id"]: str(image["file_name"]) for image in rows["images"]}
        found = {name: [] for name in files.values()}
        for annotation in sorted(rows["annotations"], key=lambda a: a.get("id", 0)):
            number = annotation["image_id"]
            name = files.get(number, f"image_id={number}")
            found.setdefault(name, []).extend(_said(annotation["caption"]))
        return found, others
    wanted = set[str]()
    if isinstance(rows, dict) and "images" in rows:  # Karpathy's
        rows = rows["images"]
        there = {row["split"] for row in rows if "split" in row}
        wanted = set(split.split("+")) if there else wanted
        if wanted - there:
            fix = f"is not in the captions: use some of {', '.join(sorted(there))}"
            raise UsageError("data.split", split, f"{fix}, joined by +")
    elif isinstance(rows, dict):
        rows = [{"file_name": name, "captions": said} for name, said in rows.items()]
    known: list[str] = []
    for number, row in enumerate(rows, 1):
        row = {str(key).strip().lower(): value for key, value in row.items()}
        known = known or [*row]
        names = [row[key] for key in _NAMES if row.get(key) and isinstance(row[key], str)]
        if not names:
            said = f"row {number} has no file name: it has {', '.join(row)[:200]}"
            raise ValueError(f"{said}, and needs one of {', '.join(_NAMES)}")
        folder = row.get("filepath")  # Karpathy's of COCO
        name = f"{folder}/{names[0]}" if folder else names[0]
        if wanted and row.get("split") not in wanted:
            others.add(name)
        else:
            found.setdefault(name, []).extend(_said(row))
    if known and not any(found.values()):
        said = f"none of its rows has a caption: they have {', '.join(known)[:200]}"
        raise ValueError(f"{said}, and need one of {', '.join(_CAPTIONS)}")
    return found, others


def _said(value: Any) -> list[str]:
    """The captions in a text, in a list of such, or in what has them by one of the known names."""
    if value is None or isinstance(value, str):
        return clean([value or ""])
    if isinstance(value, list):
        return [caption for part in value for caption in _said(part)]
    if isinstance(value, dict):
        return _said(next((value[key] for key in _CAPTIONS if value.get(key)), None))
    raise ValueError(f"a caption is {value!r:.40}, not a text")
