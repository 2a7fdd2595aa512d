"""The checkpoint folder: names, structure check, reading, writing, checksums, facts. Nothing else knows it."""

from .names import (
    BI_FILE,
    CACHE_LINE,
    CONFIG_KEY,
    DELTA_FILE,
    GENERATOR_CONFIG,
    GENERATOR_FOLDER,
    INDEX_FILE,
    NOTICES,
    ROUTER_FILE,
    SHARED_FILE,
    SUMS_FILE,
    UNI_FILE,
    CheckpointError,
    is_checkpoint,
    is_of_others,
    is_part,
    notices_in,
    refuse_foreign_weights,
)
from .structure import check_checkpoint, read_config, read_shapes
from .summary import facts
from .sums import verify_sums, write_sums
from .writing import data_start, generator_tensors, name_first_module, plain_dtypes, save_tensors, write

__all__ = [
    "BI_FILE",
    "CACHE_LINE",
    "CONFIG_KEY",
    "DELTA_FILE",
    "GENERATOR_CONFIG",
    "GENERATOR_FOLDER",
    "INDEX_FILE",
    "NOTICES",
    "ROUTER_FILE",
    "SHARED_FILE",
    "SUMS_FILE",
    "UNI_FILE",
    "CheckpointError",
    "check_checkpoint",
    "data_start",
    "facts",
    "generator_tensors",
    "is_checkpoint",
    "is_of_others",
    "is_part",
    "name_first_module",
    "notices_in",
    "plain_dtypes",
    "read_config",
    "read_shapes",
    "refuse_foreign_weights",
    "save_tensors",
    "verify_sums",
    "write",
    "write_sums",
]
