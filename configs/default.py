"""Every field of a config, with its meaning and the published value (DiCo at 256x256).

Not an experiment of its own: the other files start from it and change fields. A config is locked,
so a field that is not here cannot be set by mistake.
"""

from ml_collections import config_dict


def get_config():
    config = config_dict.ConfigDict()

    # All randomness of a run follows from (seed, step) or (seed, image index).
    config.seed = 0

    config.data = config_dict.ConfigDict()
    # Where examples come from: "latents" (prepared by dico_jax.prepare), "folder" (pictures in a
    # subfolder per class), "zip" (the same in a zip file), "tfds" (TensorFlow Datasets),
    # "array_record" (ArrayRecord files of tf.train.Examples), "arrays" (NumPy files) or "digits"
    # (scikit-learn's 1,797 digits). docs/data.md describes each.
    config.data.source = "latents"
    # Folder or file of the source, local or gs://; for "tfds" its data_dir.
    config.data.path = config_dict.placeholder(str)
    # "tfds" only: the dataset, such as "imagenet2012:5.1.0" or "cifar10", and its split.
    config.data.name = config_dict.placeholder(str)
    config.data.split = "train"
    # Side of the (square) images in pixels; latents are smaller by the autoencoder's factor.
    config.data.image_size = 256
    # Examples per step, over all devices.
    config.data.batch_size = 256
    # Mirror each example with probability 1/2.
    config.data.horizontal_flip = True
    # Turn pictures as their EXIF data say. Cameras' pictures need it; the published ImageNet
    # pipeline does not look at it.
    config.data.exif_rotation = False
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
    # Local folder to copy gs:// latents into, which cannot be read in place.
    config.data.cache_dir = config_dict.placeholder(str)

    config.autoencoder = config_dict.ConfigDict()
    # "sd_vae" (Stable Diffusion's, with weights from `path`), "identity" for models of pixels, or
    # "latent_preview", which shows latents as small false-colour pictures and needs no weights.
    config.autoencoder.name = "sd_vae"
    # Weights of "sd_vae": what `dico_jax.convert vae` wrote, a file or folder in the layout of
    # diffusers, or hf://OWNER/REPO/FILE (which needs the extra `hub`); see docs/conversion.md.
    config.autoencoder.path = "hf://stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors"
    # Dtype of its activations: "float32" or "bfloat16" (about 1e-2 off). Parameters are float32.
    config.autoencoder.dtype = "float32"
    # Decode in overlapping tiles of this many latent positions a side, at least 8 (0: never), for
    # images whose activations do not fit in memory. Tiles change the colours a little: GroupNorm
    # and attention see one tile.
    config.autoencoder.tile_size = 0

    config.model = config_dict.ConfigDict()
    # A published size such as "DiCo-XL" or "DiT-XL/2", or "DiCo" or "DiT" with the sizes below.
    config.model.name = "DiCo-S"
    # Sizes of "DiCo" and "DiT"; published sizes have their own (leave these unset).
    config.model.hidden_size = config_dict.placeholder(int)
    config.model.depth = config_dict.placeholder(object)  # five numbers for DiCo, one for DiT
    config.model.mlp_ratio = config_dict.placeholder(float)
    config.model.num_heads = config_dict.placeholder(int)  # DiT only
    config.model.patch_size = config_dict.placeholder(int)  # DiT only
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

    config.diffusion = config_dict.ConfigDict()
    config.diffusion.diffusion_steps = 1000
    # "linear" or "squaredcos_cap_v2".
    config.diffusion.noise_schedule = "linear"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0

    config.training = config_dict.ConfigDict()
    config.training.num_steps = 400_000
    # Decay per step of the averaged weights, which are the ones that are sampled and evaluated.
    config.training.ema_decay = 0.9999
    config.training.log_every_steps = 100
    config.training.checkpoint_every_steps = 10_000
    # How many of the newest checkpoints to keep.
    config.training.keep_checkpoints = 3
    # Workdir or converted checkpoint whose (averaged) weights a new run starts from. It may have
    # another number of classes, whose label tables then start fresh, and another image size.
    config.training.init_from = config_dict.placeholder(str)

    config.sampling = config_dict.ConfigDict()
    # "ddpm" (ancestral) or "ddim".
    config.sampling.sampler = "ddpm"
    # Sampling steps, respaced from diffusion.diffusion_steps.
    config.sampling.num_steps = 250
    # 0 for deterministic DDIM, 1 for as much noise as DDPM.
    config.sampling.ddim_eta = 0.0
    # Classifier-free guidance scale; 1 for none.
    config.sampling.cfg_scale = 1.4
    # Which noise channels are guided: "first_three" (as the released code does) or "all".
    config.sampling.cfg_channels = "first_three"
    config.sampling.batch_size = 64
    # A grid of samples of the averaged weights is saved this often (0: never), with this many rows
    # (classes) and columns.
    config.sampling.grid_every_steps = 10_000
    config.sampling.grid_rows = 8
    config.sampling.grid_columns = 8

    config.eval = config_dict.ConfigDict()
    # At the end, this many samples are judged by a classifier fitted on the real pictures (0:
    # none). For small labelled sets in pixel space, such as the digits; all are held in memory.
    config.eval.class_agreement_samples = 0

    config.lock()
    return config
