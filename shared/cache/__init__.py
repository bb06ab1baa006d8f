"""The logit cache: format, writer, reader; needs numpy and h5py alone. `FORMAT.md` is the normative text."""
