"""Records what transformers computes with a tiny CLIP, into tests/data/clip: run with torch there.

    python -m tests.make_clip_numbers

Weights are drawn by recipe C of the golden numbers, so only the outputs are kept.
"""

import json
import math
import pathlib
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "data" / "clip"
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 24,
}
TEXT = {
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "projection_dim": 24,
}
WORDS = "a an the red big bus plate of food dog cat is it's don't we're running seven thick in on"
TEXTS = [
    "a red bus",
    "A RED bus!",
    "",
    "   ",
    " a \t plate\n of   food ",
    "it's don't we're they'll I'd you've I'm",
    "1234 cats, 5.6%",
    "こんにちは世界",
    "Привет, мир; naïve café",
    "مرحبا بالعالم שלום",
    "नमस्ते दुनिया",
    "a dog \N{DOG FACE}\N{PARTY POPPER} \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
    "e\N{COMBINING ACUTE ACCENT} Å \N{LATIN SMALL LIGATURE FI} ﬁ ½ ² Ⅷ",
    "<|startoftext|> inside <|endoftext|> too",
    "don\N{RIGHT SINGLE QUOTATION MARK}t “quote” — dash … "
    "\N{NO-BREAK SPACE}nbsp\N{IDEOGRAPHIC SPACE}x",
    "hyphen-ated under_score #tag @who http://a.b/c?d=e",
    "\N{ZERO WIDTH SPACE}\N{BYTE ORDER MARK}\x01\x7f odd",
    "a red bus " * 50,
    "İstanbul STRASSE ß ǅ ΑΣ",
]


def draw(shapes, seed):
    """Weights of recipe C: PyTorch key to float32 array."""
    rng, out = np.random.Generator(np.random.PCG64(seed)), {}
    for key in sorted(shapes):
        shape = tuple(shapes[key])
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        if key.endswith(".bias"):
            value = 0.1 * rng.standard_normal(shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        elif "embedding" in key:
            value = 0.5 * rng.standard_normal(shape)
        else:
            value = math.sqrt(1.0 / fan_in) * rng.standard_normal(shape)
        out[key] = value.astype(np.float32)
    return out


def write_tokenizer():
    """vocab.json and merges.txt: CLIP's bytes, and the merges of a few words."""
    from transformers.models.clip import tokenization_clip as module

    to_unicode = getattr(module, "bytes_to_unicode", None)
    if to_unicode is None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode as to_unicode
    letters = list(to_unicode().values())
    vocab, merges = letters + [f"{letter}</w>" for letter in letters], []
    for word in WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = tuple(parts[:2])
            if pair not in merges:
                merges.append(pair)
                vocab += ["".join(pair)] if "".join(pair) not in vocab else []
            parts[:2] = ["".join(pair)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    FOLDER.mkdir(exist_ok=True)
    ids = {token: i for i, token in enumerate(vocab)}
    (FOLDER / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (FOLDER / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(vocab)


def main():
    import torch
    import transformers

    size = write_tokenizer()
    files = {name: str(FOLDER / name) for name in ("vocab.json", "merges.txt")}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            pathlib.Path(folder, name).write_bytes(pathlib.Path(path).read_bytes())
        tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        tokenizer.save_pretrained(folder)
        whole = json.loads(pathlib.Path(folder, "tokenizer.json").read_text())
        (FOLDER / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False) + "\n")
    (FOLDER / "ids.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}) + "\n")

    rng = np.random.default_rng(0)
    config = transformers.CLIPVisionConfig(**IMAGE)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    weights = draw({k: v.shape for k, v in state.items()}, seed=1)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    pixels = rng.normal(size=(3, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        embeds = model(torch.from_numpy(pixels)).image_embeds
        embeds64 = model.double()(torch.from_numpy(pixels).double()).image_embeds

    text_config = transformers.CLIPTextConfig(
        **TEXT, vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1
    )
    text = transformers.CLIPTextModelWithProjection(text_config).eval()
    state = {k: v for k, v in text.state_dict().items() if not k.endswith("position_ids")}
    drawn = draw({k: v.shape for k, v in state.items()}, seed=2)
    text.load_state_dict({k: torch.from_numpy(v) for k, v in drawn.items()}, strict=False)
    padded = [row[:76] + row[-1:] if len(row) > 77 else row for row in ids]
    padded = [row + [size - 1] * (77 - len(row)) for row in padded]
    with torch.no_grad():
        text_embeds = text(torch.tensor(padded)).text_embeds

    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    found = {}
    for side, shape in {"wide": (40, 61, 3), "tall": (61, 32, 3), "small": (16, 16, 3)}.items():
        image = smooth(rng, shape)
        found[f"image/{side}"] = image
        found[f"pixels/{side}"] = np.asarray(
            processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"]
        )[0].transpose(1, 2, 0)
    np.savez_compressed(
        FOLDER / "numbers.npz",
        pixels=pixels,
        image_embeds=embeds.numpy(),
        image_embeds_f64=embeds64.numpy(),
        text_embeds=text_embeds.numpy(),
        shapes=json.dumps(
            {
                "image": {k: list(v.shape) for k, v in weights.items()},
                "text": {k: list(v.shape) for k, v in drawn.items()},
            }
        ),
        versions=json.dumps({m.__name__: m.__version__ for m in (torch, transformers)}),
        **found,
    )


def smooth(rng, shape):
    """A picture with edges and slopes, uint8."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    waves = [np.sin(rows * a + columns * b) for a, b in rng.uniform(-0.8, 0.8, (3, 2))]
    image = 128 + 100 * np.stack(waves, -1) + 40 * (rng.random((*shape[:2], 1)) > 0.9)
    return image.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
