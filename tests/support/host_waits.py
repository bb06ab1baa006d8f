"""Counts, on a processor, the calls for which a host would wait on a GPU: those whose result depends on its data."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# `item` and `is_nonzero` are calls of their own only in inference mode.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique2")


class HostWaits(TorchDispatchMode):
    """Within it, `found` lists each call that reads a value or has a shape that depends on the data.

    Copies to the host are calls of their own only between devices; `Tensor.cpu` is counted where it is called.
    """

    def __init__(self):
        super().__init__()
        self.found = []
        self._cpu = torch.Tensor.cpu

    def __enter__(self):
        def cpu(tensor, *arguments, **options):
            self.found.append(f"cpu {tuple(tensor.shape)}")
            return self._cpu(tensor, *arguments, **options)

        torch.Tensor.cpu = cpu
        return super().__enter__()

    def __exit__(self, *exception):
        torch.Tensor.cpu = self._cpu
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or by_mask:
            self.found.append(f"{'nonzero' if by_mask else name} {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))
