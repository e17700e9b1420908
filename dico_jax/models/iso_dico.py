"""DiCo's blocks one after the other at one resolution (arXiv 2505.11196, table 4: isotropic)."""

import functools

import flax.linen as nn

from dico_jax.models import layers
from dico_jax.models.block_stacks import Stage
from dico_jax.models.denoiser import ClassConditional
from dico_jax.models.dico import DiCoBlock
from dico_jax.models.dit import PatchConv
from dico_jax.models.layers import Dense


class IsoDiCo(ClassConditional):
    """DiCo's blocks in the place of DiT's, without a position table: called as every `Denoiser`.

    Attributes:
      hidden_size, depth: width and number of the blocks.
      patch_size: side of the patches that positions are made of.
      mlp_ratio: feed-forward width over hidden_size.
    """

    hidden_size: int = 1152
    depth: int = 23
    patch_size: int = 1
    mlp_ratio: float = 6.5

    stages = ("blocks",)

    def checks(self):
        yield from super().checks()
        yield "mlp_ratio", int(self.mlp_ratio * self.hidden_size) > 0, "leaves no feed-forward"

    @property
    def size_divisor(self) -> int:  # type: ignore[override]
        return self.patch_size

    @nn.compact
    def forward(self, x, t, condition):
        n, height, width, _ = x.shape
        rows, columns, p = height // self.patch_size, width // self.patch_size, self.patch_size
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype

        c = layers.embed_times(t, d, wide, "t_embedder")
        c += self.embed_labels(condition, (("embedding_table", d),))[0]

        proj = functools.partial(PatchConv, d, p, dtype)
        x = layers.Named("proj", proj, name="x_embedder")(x).reshape(n, rows, columns, d)
        block = functools.partial(DiCoBlock, d, self.mlp_ratio, dtype)
        x = Stage(self.depth, block, dtype, self.scan_blocks, self.remat, name="blocks")(x, c)
        linear = functools.partial(Dense, p * p * self.out_channels, dtype)
        final = layers.FinalLayer("linear", linear, dtype, store_input=True, name="final_layer")

        x = final(x, c).reshape(n, rows, columns, p, p, self.out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1).astype(wide)

    def macs(self, positions):
        d, patch = self.hidden_size, self.patch_size**2
        size = positions // patch
        ends = size * patch * d * (self.in_channels + self.out_channels)
        per_position = 2 * d**2 + 9 * d + 2 * d * int(self.mlp_ratio * d)
        block = 7 * d**2 + size * per_position  # modulation and attention are of vectors
        return self.time_macs(d) + 2 * d**2 + ends + self.depth * block
