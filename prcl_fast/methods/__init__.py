"""Training methods, one file each, with the interface `base.Method`."""

from __future__ import annotations

from prcl_fast.config import Config
from prcl_fast.config.methods import (
    CPSConfig,
    MeanTeacherConfig,
    PCRConfig,
    PPSConfig,
    PRCLConfig,
    SupervisedConfig,
)
from prcl_fast.methods.base import Method, StepIndex
from prcl_fast.methods.cps import CPS
from prcl_fast.methods.mean_teacher import MeanTeacher
from prcl_fast.methods.pcr import PCR
from prcl_fast.methods.pps import PPS
from prcl_fast.methods.prcl import PRCL
from prcl_fast.methods.supervised import Supervised

__all__ = ["CPS", "PCR", "PPS", "PRCL", "MeanTeacher", "Method", "StepIndex", "Supervised", "build_method"]


def build_method(config: Config, num_classes: int) -> Method:
    """The method of the section `config.method`, its networks freshly initialised.

    Raises:
        InputError: the method does not support so many classes.
    """
    kinds: dict[type, type[Method]] = {
        SupervisedConfig: Supervised,
        MeanTeacherConfig: MeanTeacher,
        PRCLConfig: PRCL,
        PCRConfig: PCR,
        CPSConfig: CPS,
        PPSConfig: PPS,
    }
    method: Method = kinds[type(config.method)](config, num_classes)
    return method
