"""Data sets: VOC, Cityscapes, folders of images, generated images."""

from collections.abc import Callable, Mapping

from prcl_fast.config import DataConfig
from prcl_fast.data.source import Source
from prcl_fast.data.sources.cityscapes import build_cityscapes
from prcl_fast.data.sources.folder import build_folder
from prcl_fast.data.sources.synthetic import SyntheticSource
from prcl_fast.data.sources.voc import build_voc

_BUILDERS: Mapping[str, Callable[[DataConfig], Source]] = {
    "voc": build_voc,
    "cityscapes": build_cityscapes,
    "folder": build_folder,
    "synthetic": SyntheticSource,
}


def build_source(data: DataConfig) -> Source:
    """The data set of a configuration, with every image of its splits and every label needed found on disk.

    Raises:
        InputError: naming the split file and its line, the folder or the key at fault.
    """
    return _BUILDERS[data.kind](data)
