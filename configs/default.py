"""Every field of a config, with its meaning and the published value (DiCo at 256x256).

Not an experiment of its own: the other files start from it and change fields. A config is locked,
so a field that is not here cannot be set by mistake.
"""

import math

from ml_collections import config_dict

# Numbers are finite and from 0 on, whole ones up to 2**31 - 1, but for these fields: by the lowest
# and the highest number. None where a number has to fit something, which is said where it does not.
RANGES = {
    (0, 1): "data.max_bad_fraction optimizer.min_learning_rate_ratio sampling.ddim_eta "
    "sampling.cfg_rescale diffusion.jump_share",
    (0, math.nextafter(1, 0)): "optimizer.b1 optimizer.b2 training.ema_decay "
    "model.class_dropout_prob model.text_dropout_prob",
    (-100, 100): "diffusion.logit_mean",
    (0, 255): "data.num_workers",
    (0, 1000): "model.mlp_ratio",
    (0, 2**32 - 1): "seed",
    (1, 255): "training.preemption_exit_status",
    (0, 2**14): "model.pooled_width",
    (1, 1000): "sampling.grid_rows sampling.grid_columns model.depth model.text_length "
    "model.text_layers",
    (1, 2**14): "data.image_size model.in_channels model.patch_size model.num_heads "
    "model.text_width model.window_size",
    (1, 2**20): "model.hidden_size model.num_classes sampling.batch_size sampling.num_steps",
    (1, 2**31 - 1): "training.num_steps training.accumulation_steps training.log_every_steps "
    "training.checkpoint_every_steps training.keep_checkpoints profile.num_steps",
    (None, 2**20): "data.batch_size diffusion.diffusion_steps mesh.data mesh.fsdp mesh.tensor "
    "autoencoder.tile_size",
    (None, 2**31 - 1): "eval.num_samples training.ema_snapshot_every_steps",
}
# Fields, and flags of the commands, that name a file or a folder, by what may stand for a disk
# before "://". In them "~" and environment variables are replaced.
PATHS = {
    "": "data.cache_dir config",
    "gs s3": "data.path data.captions training.compilation_cache training.init_from "
    "eval.reference eval.features eval.inception path captions samples reference features workdir "
    "images ckpt out npz inception calibrate plan",
    "gs s3 hf": "sample.ckpt app.ckpt evaluate.ckpt export.ckpt analyze.ckpt show.file guide "
    "autoencoder.path text.path vae text_encoder clip input text",
}
# Fields that are one of some words.
CHOICES = {
    "data.crop": ("adm", "lanczos"),
    "diffusion.time_sampling": ("uniform", "logit_normal"),
    "model.text_fusion": ("dwc", "cross_attention"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.layout": ("u", "isotropic", "isotropic_skip"),
    "model.mixer": ("conv", "attention", "window_attention"),
    "model.channel_attention": (
        "compact",
        "squeeze_excite",
        "self_attention",
        "response_norm",
        "none",
    ),
    "model.kernel_size": (3, 5, 7),
    "model.activation": ("gelu", "relu"),
    "text.encoder": ("clip", "words"),
    "optimizer.name": ("adamw", "lion"),
    "optimizer.schedule": ("constant", "cosine"),
    "optimizer.weight_decay_mask": ("all", "kernels"),
    "training.on_nan": ("stop", "skip", "rollback"),
}
# How parameters are split where `config.mesh.rules` is (): the first of two matrix products in a
# row by its output channels over "tensor", the second by its input channels, so that only the
# second's output is summed over devices. The other channels are split over "fsdp".
RULES = (
    (r"/(conv[14]|ca/1|qkv|fc1|pwconv1|adaLN_modulation/1)/kernel$", ("fsdp", "tensor")),
    (r"/(conv[14]|ca/1|qkv|fc1|pwconv1|adaLN_modulation/1)/bias$", ("tensor",)),
    (r"/(conv[35]|ca/3|proj|fc2|pwconv2)/kernel$", ("tensor", "fsdp")),
    (r"/conv2/kernel$", (None, None, None, "tensor")),
    (r"/(conv2/bias|grn/(gamma|beta))$", ("tensor",)),
    (r"/dwconv/kernel$", (None, None, None, "fsdp")),
    (r"/body/0/kernel$", (None, None, "fsdp", "tensor")),
    (r"embedding_table[^/]*/embedding$", (None, "fsdp")),
    (r"(reduce_chan_level\d|mlp/[02]|linear(_\d+)?)/kernel$", ("fsdp", "tensor")),
    (r"(out_proj|output_layer)/kernel$", (None, None, "fsdp", None)),
)


# Fields that older runs wrote and that decide nothing any more: left out where they are read.
GONE = frozenset({"model.depthwise"})
# Fields that may change at a checkpoint of a run where --allow_config_change names them.
CAREFUL_FIELDS = ("data.batch_size", "optimizer.learning_rate", "model.dtype", "training.num_steps")
# Fields by section, and whole sections, that may change between two runs in one workdir: they
# decide how long a run goes on, how fast it is and what it reports, not what it computes.
MUTABLE_FIELDS = {
    "data": "source name split path captions max_bad_fraction num_workers verify_checksums "
    "cache_dir cache_gb",
    "autoencoder": "path tile_size",
    "text": "path",
    "model": "scan_blocks remat",  # these and the mesh change the rounding of sums
    "training": "num_steps accumulation_steps ema_snapshot_every_steps log_every_steps "
    "checkpoint_every_steps keep_checkpoints keep_every_steps preemption_exit_status on_nan "
    "stall_warning_seconds compilation_cache",
}
MUTABLE_SECTIONS = ("mesh", "profile", "logging", "sampling", "eval")


def get_config():
    config = config_dict.ConfigDict()

    # All randomness of a run follows from (seed, step) or (seed, image index).
    config.seed = 0

    config.data = config_dict.ConfigDict()
    # Where examples come from: "latents" (prepared by dico_jax.prepare), "folder" (pictures in a
    # subfolder per class), "zip" (the same in a zip file), "tfds" (TensorFlow Datasets),
    # "array_record" (ArrayRecord files of tf.train.Examples), "arrays" (NumPy files) or "digits"
    # (scikit-learn's 1,797 digits). With captions: "captions" (pictures and a file of their
    # captions, or a text beside each), "tar" (webdataset's tar files), "tfds" (coco_captions) or
    # "worded_digits" (the digits, described). docs/data.md describes each.
    config.data.source = "latents"
    # Folder or file of the source, local or gs://; for "tfds" its data_dir.
    config.data.path = config_dict.placeholder(str)
    # "tfds" only: the dataset, such as "imagenet2012:5.1.0" or "cifar10".
    config.data.name = config_dict.placeholder(str)
    # The split of "tfds", and of Karpathy's file of "captions", such as "train+restval".
    config.data.split = "train"
    # "captions" only: the file with captions by name of a picture (JSON, JSON lines, CSV, COCO's or
    # Karpathy's); None for metadata.jsonl, or a .txt beside every picture.
    config.data.captions = config_dict.placeholder(str)
    # Side of the (square) images in pixels; latents are smaller by the autoencoder's factor.
    config.data.image_size = 256
    # Examples per step, over all devices.
    config.data.batch_size = 256
    # Mirror each example with probability 1/2.
    config.data.horizontal_flip = True
    # Turn pictures as their EXIF data say. Cameras' pictures need it; the published ImageNet
    # pipeline does not look at it.
    config.data.exif_rotation = False
    # How a square is cut out: "adm" as the published ImageNet pipeline does, or "lanczos", the
    # middle square scaled by a Lanczos filter, as U-ViT does with MS-COCO.
    config.data.crop = "adm"
    # What the network sees of the autoencoder's posterior: "sample" (drawn anew at every visit),
    # "mean", or "fixed" (one draw per example and orientation, as the released code prepares).
    config.data.latent_sampling = "sample"
    # Pictures that cannot be read are skipped and listed in bad_examples.jsonl of the workdir; when
    # more than this fraction of all examples is bad, training stops.
    config.data.max_bad_fraction = 0.001
    # Processes that read and decode; 0 uses threads of this process.
    config.data.num_workers = 0
    # Compare prepared latents with the checksums of their manifest before training starts.
    config.data.verify_checksums = True
    # Local folder to copy gs:// latents into before the start; without one they are read in place,
    # each process its part. At most so many gigabytes of them, the rest being read in place (None:
    # all).
    config.data.cache_dir = config_dict.placeholder(str)
    config.data.cache_gb = config_dict.placeholder(float)

    config.autoencoder = config_dict.ConfigDict()
    # "sd_vae" (Stable Diffusion's, with weights from `path`), "identity" for models of pixels, or
    # "latent_preview", which shows latents as small false-colour pictures and needs no weights;
    # "vavae_preview" does so with the 16x16x32 latents of VA-VAE.
    config.autoencoder.name = "sd_vae"
    # Weights of "sd_vae": what `dico_jax.convert vae` wrote, a file or folder in the layout of
    # diffusers, or hf://OWNER/REPO/FILE (which needs the extra `hub`); see docs/conversion.md.
    config.autoencoder.path = "hf://stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors"
    # Dtype of its activations: "float32" or "bfloat16" (about 1e-2 off). Parameters are float32.
    config.autoencoder.dtype = "float32"
    # What latents are multiplied by for the diffusion; unset for what the weights come with.
    config.autoencoder.scaling_factor = config_dict.placeholder(float)
    # Decode in overlapping tiles of this many latent positions a side, at least 8 (0: never), for
    # images whose activations do not fit in memory. Tiles change the colours a little: GroupNorm
    # and attention see one tile.
    config.autoencoder.tile_size = 0

    config.model = config_dict.ConfigDict()
    # A published size such as "DiCo-XL", "DiT-XL/2" or "FCDM-XL", or "DiCo", "DiT", "FCDM" or
    # "IsoDiCo" ("DiCo" of an isotropic layout) with the sizes below.
    config.model.name = "DiCo-S"
    # Sizes of "DiCo" and "DiT"; published sizes have their own (leave these unset).
    config.model.hidden_size = config_dict.placeholder(int)
    config.model.depth = config_dict.placeholder(object)  # five numbers for DiCo, else one
    config.model.mlp_ratio = config_dict.placeholder(float)
    config.model.num_heads = config_dict.placeholder(int)  # DiT only
    config.model.patch_size = config_dict.placeholder(int)  # DiT and IsoDiCo
    # Attention of positions, and to a text: its implementation, "auto", "xla" or "cudnn".
    config.model.attention = config_dict.placeholder(str)

    # The papers' ablations (docs/ablations.md); unset for the published networks. How blocks
    # follow: "u" (DiCo's), "isotropic" (DiT's), or "isotropic_skip" with long skips.
    config.model.layout = config_dict.placeholder(str)
    # What mixes positions: "conv" (DiCo's), or "attention" (DiT's) or "window_attention" in the
    # place of DiCo's conv module.
    config.model.mixer = config_dict.placeholder(str)
    # Side of the windows of "window_attention", in positions of every stage; 8 where unset.
    config.model.window_size = config_dict.placeholder(int)
    # Of DiCo's conv module: "compact" (DiCo's), "squeeze_excite", "self_attention" (of channels to
    # each other), "response_norm" (FCDM's) or "none".
    config.model.channel_attention = config_dict.placeholder(str)
    # Of the depthwise convolution: 3 (DiCo's), 5 or 7 (FCDM's).
    config.model.kernel_size = config_dict.placeholder(int)
    # Inside the blocks: "gelu" or "relu".
    config.model.activation = config_dict.placeholder(str)

    # Channels of the latents (or pixels) that the network sees.
    config.model.in_channels = 4
    # Unset (None) to take it from the source.
    config.model.num_classes = config_dict.FieldReference(1000, int)
    # Probability of dropping the label in training, which guidance needs; 0 for no null class.
    config.model.class_dropout_prob = 0.1
    # Whether the network also predicts the variance.
    config.model.learn_sigma = True
    # Dtype of activations: "float32", or "bfloat16" on accelerators. Parameters are float32.
    config.model.dtype = "float32"
    # Run equal blocks as one loop, so that compiling takes as long whatever the depth. Checkpoints
    # and results are the same; combine it with remat "dots" or "blocks", because a loop keeps more
    # for the backward pass, and leave memory for a second copy of the state while it is saved.
    config.model.scan_blocks = False
    # What the backward pass computes again to save memory: "none", "dots" (everything inside the
    # blocks but matrix products with parameters) or "blocks" (everything inside the blocks).
    config.model.remat = "none"
    # Run every operation in its plain form, which can be differentiated forwards and twice, for
    # objectives that need it. Gradients take more time and memory.
    config.model.plain_ops = False
    # Tell the network two times, from where to where a step leads: "mean_flow" only.
    config.model.two_times = False

    # Networks that are told a text only: how it meets the picture, "dwc" (a depthwise convolution
    # whose kernel the text gives) or "cross_attention".
    config.model.text_fusion = config_dict.placeholder(str)
    # Tokens of a text, the width of their features, and that of the pooled features, 0 to do
    # without these; unset for CLIP ViT-L/14's 77, 768 and 768.
    config.model.text_length = config_dict.placeholder(int)
    config.model.text_width = config_dict.placeholder(int)
    config.model.pooled_width = config_dict.placeholder(int)
    # Layers of an encoder that is trained along.
    config.model.text_layers = config_dict.placeholder(int)
    # Probability of replacing the text by none in training, which guidance needs.
    config.model.text_dropout_prob = config_dict.placeholder(float)

    config.text = config_dict.ConfigDict()
    # What reads texts for a network that is told some: "clip" (frozen, with weights from `path`),
    # or "words", a small encoder that is trained along and knows `words`.
    config.text.encoder = "clip"
    # "clip" only: a folder as transformers writes it, a file in one, or hf://OWNER/REPO/FILE.
    config.text.path = "hf://openai/clip-vit-large-patch14/model.safetensors"
    # "words" only: its words, lower case, between spaces; all others are one that is unknown.
    config.text.words = ""

    config.mesh = config_dict.ConfigDict()
    # Devices along each axis of the mesh; their product is the number of devices. "data" copies the
    # state (-1: all devices that the others leave), "fsdp" shares it among devices that also split
    # the batch, "tensor" splits the channels of every layer.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    # How parameters are split: pairs of (regular expression of parameter paths, axes), such as
    # (("conv1/kernel$", ("fsdp", "tensor")),); () for RULES above.
    config.mesh.rules = ()

    config.diffusion = config_dict.ConfigDict()
    # What the network learns: "noise" (and the variance), the published objective; "x0" or
    # "velocity" of the same process; "flow", the velocity of flow matching; or "mean_flow", its
    # mean between two times, for samples in one to four steps. docs/training.md describes each.
    config.diffusion.objective = "noise"
    # The process of "noise", "x0" and "velocity".
    config.diffusion.diffusion_steps = 1000
    # "linear" or "squaredcos_cap_v2".
    config.diffusion.noise_schedule = "linear"
    # "velocity" only: rescale the process so that its last step has no signal left.
    config.diffusion.zero_terminal_snr = False
    # Weigh the squared errors of the process so that those of the x_0 count by the signal-to-noise
    # ratio, at most this (min-SNR weighting, whose paper has 5); 0 for the published weights.
    config.diffusion.min_snr_gamma = 0.0
    # Times of "flow" and "mean_flow": "uniform", or "logit_normal", a sigmoid of a normal of this
    # mean and deviation 1; a mean below 0 has more times near the data.
    config.diffusion.time_sampling = "uniform"
    config.diffusion.logit_mean = 0.0
    # What their times, from 0 to 1, are multiplied by for the network, whose time features are made
    # for 0 to 999. SiT and REPA give it times as they are (1).
    config.diffusion.time_scale = 1000.0
    # "mean_flow": the share of examples that learn the mean between two times that differ, and the
    # power of its squared error that the loss of an example is divided by (0 for none).
    config.diffusion.jump_share = 0.25
    config.diffusion.loss_power = 1.0

    config.optimizer = config_dict.ConfigDict()
    # "adamw", or "lion", which has half of its state and wants about a tenth of its learning rate,
    # ten times its weight decay and b2=0.99.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8  # adamw only
    # The learning rate rises in a straight line over this many steps.
    config.optimizer.warmup_steps = 0
    # After that: "constant", or "cosine", which falls to min_learning_rate_ratio of learning_rate
    # at training.num_steps.
    config.optimizer.schedule = "constant"
    config.optimizer.min_learning_rate_ratio = 0.0
    # Gradients with a larger norm (over all parameters) are scaled down to this one; 0 for none.
    config.optimizer.clip_norm = 0.0
    config.optimizer.weight_decay = 0.0
    # What decays: "all" parameters, as PyTorch's AdamW does, or "kernels" of linear layers and
    # convolutions, without biases and label tables.
    config.optimizer.weight_decay_mask = "all"

    config.training = config_dict.ConfigDict()
    config.training.num_steps = 400_000
    # Parts of a batch whose gradients are computed one after the other, to save memory.
    config.training.accumulation_steps = 1
    # Decay per step of the averaged weights, which are the ones that are sampled and evaluated.
    config.training.ema_decay = 0.9999
    # More averages, whose widths grow with the run (EDM2's power functions): their relative widths
    # (standard deviations over the time trained), such as (0.05, 0.1). Each is as large as the
    # weights.
    config.training.ema_widths = ()
    # Keep these averages this often (0: never), for good, each as large as the weights. From them
    # an average of any width, of any of these steps, can be sampled afterwards.
    config.training.ema_snapshot_every_steps = 0
    config.training.log_every_steps = 100
    config.training.checkpoint_every_steps = 10_000
    # How many of the newest checkpoints to keep.
    config.training.keep_checkpoints = 3
    # Checkpoints whose step this divides are kept for ever, besides the newest ones; 0 for none.
    config.training.keep_every_steps = 0
    # How the process ends when it was sent SIGTERM and has saved. 143 is what launchers take for
    # that (see docs/launch.md); the same command goes on from there.
    config.training.preemption_exit_status = 143
    # Workdir or converted checkpoint whose (averaged) weights a new run starts from. It may have
    # another number of classes, whose label tables then start fresh, and another image size.
    config.training.init_from = config_dict.placeholder(str)
    # When a loss or its gradients are not finite: "stop", "skip" (leave that step's update out;
    # stop after 100 in a row) or "rollback" (return to the newest checkpoint and go on with other
    # noise, at most 3 times from one checkpoint). What such a step has touched is never saved.
    config.training.on_nan = "stop"
    # Warn, and write where Python stands into stall.txt of the workdir, when no step has ended for
    # this many seconds (0: never; twice as many for the first step, which is compiled).
    config.training.stall_warning_seconds = 600
    # Folder that keeps compiled programs for later runs, local or gs://; "" for none. "default" is
    # $XDG_CACHE_HOME/dico_jax/xla or ~/.cache/dico_jax/xla, and none on CPUs, whose programs do not
    # fit other processors. Who can write to the folder can run code as you.
    config.training.compilation_cache = "default"

    config.sampling = config_dict.ConfigDict()
    # "ddpm" (ancestral) and "ddim"; "dpmpp_2m" (also called "dpmpp"), "dpmpp_3m", "unipc_2" and
    # "unipc_3" for 10 to 30 steps; "dpmpp_2m_sde"; "euler", "heun" (two evaluations a step) and,
    # with noise, "euler_maruyama". docs/sampling.md compares them.
    config.sampling.sampler = "ddpm"
    # Sampling steps, respaced from diffusion.diffusion_steps.
    config.sampling.num_steps = 250
    # Where on the path they are: "linear" (the published one), "quadratic", "trailing", "log_snr"
    # or "karras".
    config.sampling.spacing = "linear"
    # 0 for deterministic DDIM, 1 for as much noise as DDPM.
    config.sampling.ddim_eta = 0.0
    # Classifier-free guidance scale; 1 for none.
    config.sampling.cfg_scale = 1.4
    # Which noise channels are guided: "first_three" (as the released code does) or "all".
    config.sampling.cfg_channels = "first_three"
    # Guide only between two noise levels (sigma / alpha), such as "0.3:5"; "" for all.
    config.sampling.cfg_interval = ""
    # How the scale goes from the first step to the last: "constant", or from 1 to cfg_scale in a
    # "linear" or "cosine" way.
    config.sampling.cfg_schedule = "constant"
    # How much of the deviation that guidance adds is taken back: 0 none, 1 all.
    config.sampling.cfg_rescale = 0.0
    config.sampling.batch_size = 64
    # A grid of samples of the averaged weights is saved this often (0: never), with this many rows
    # (classes) and columns.
    config.sampling.grid_every_steps = 10_000
    config.sampling.grid_rows = 8
    config.sampling.grid_columns = 8

    config.eval = config_dict.ConfigDict()
    # Measure samples of the averaged weights after so many steps and at the end (0: never). A few
    # thousand show the course of a training; papers take 50,000 (python -m dico_jax.evaluate).
    config.eval.every_steps = 0
    config.eval.num_samples = 1000
    # Of fid, sfid, inception_score, precision_recall, kid; none for all that the reference allows.
    config.eval.metrics = ("fid", "inception_score")
    # Network whose features are compared: "inception"; "classifier", a small one that is trained on
    # the pictures first and kept in WORKDIR/classifier.npz; or a file of one.
    config.eval.features = "inception"
    # File of Inception's weights; None looks in the cache folder, then downloads the release.
    config.eval.inception = config_dict.placeholder(str)
    # What samples are compared with: an .npz of statistics or a folder of pictures; None for the
    # pictures of config.data (at most 50,000 of them), measured once into WORKDIR/reference.npz.
    config.eval.reference = config_dict.placeholder(str)
    # At the end, this many samples are judged by a classifier fitted on the real pictures (0:
    # none). For small labelled sets in pixel space, such as the digits; all are held in memory.
    config.eval.class_agreement_samples = 0

    config.profile = config_dict.ConfigDict()
    # Trace steps into WORKDIR/profile: from which step of the process on (0: never; 1 is the first
    # one, which contains compilation), and how many.
    config.profile.start_step = 0
    config.profile.num_steps = 5

    config.logging = config_dict.ConfigDict()
    # Project of Weights & Biases (which needs the extra `wandb`) to log to, besides metrics.jsonl
    # and TensorBoard; "" for none.
    config.logging.wandb_project = ""
    # Write WORKDIR/report.html, the page of the run, when all steps are taken (which needs the
    # extra `report`; without it the last lines of the run name the command).
    config.logging.report = True

    config.lock()
    return config
