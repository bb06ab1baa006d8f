"""Blocks of a data set as the loss gets them."""

import torch

from stage2_student.dataset import collate
from stage2_student.soft_labels import Decoding, NarrowRows, decode


def decoded(item, data):
    """The teacher's rows of one block of `PackedBlocks`, decoded by torch."""
    fields = {name.removeprefix("soft_"): field for name, field in collate([item]).items() if name.startswith("soft_")}
    rows = NarrowRows(**{name: field if name == "codebook" else field[0] for name, field in fields.items()})
    sampling = data.caches[0].sampling if data.with_samples else None
    return decode(rows, torch.arange(len(rows.k)), Decoding(temperature=data.temperature, sampling=sampling))
