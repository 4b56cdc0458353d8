"""Which images are trained on and held out?

`load_data` is the only way in. Each data set has a file of its own; what they share is in `bench.data.source`.
"""

from bench.config import DataConfig
from bench.data.source import UINT8_RULE, DataSource, ImageSet, balanced_order, read_uint8, to_uint8

__all__ = ["DATA_SETS", "UINT8_RULE", "DataSource", "ImageSet", "balanced_order", "load_data", "read_uint8", "to_uint8"]

DATA_SETS = ("digits", "cifar10", "folder", "packed", "latents")


def load_data(config: DataConfig) -> DataSource:
    """The data set that `config` names.

    `config.flip` is not applied here: a batch depends on its indices alone, and the trainer draws the flips.
    Raises ValueError in one sentence for an unknown name, a missing or malformed file, or an image size that the data
    set does not have.
    """
    # Imported here: each needs another library (scikit-learn, torchvision), and most runs need one of them.
    if config.name == "digits":
        from bench.data.digits import load_digits

        return load_digits(config)
    if config.name == "cifar10":
        from bench.data.cifar10 import load_cifar10

        return load_cifar10(config)
    if config.name == "folder":
        from bench.data.folder import load_folder

        return load_folder(config)
    if config.name == "packed":
        from bench.data.packed import load_packed

        return load_packed(config)
    if config.name == "latents":
        from bench.data.latents import load_latents

        return load_latents(config)
    raise ValueError(f"data.name is {config.name!r}: choose one of {', '.join(DATA_SETS)}")
