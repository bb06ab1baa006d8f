"""The head's loss on labels that a test makes, in whatever number format, in place of a cache's narrow rows."""

from stage2_student.fused import HeadLoss
from stage2_student.losses import SoftLabels


class GivenLabels(HeadLoss):
    """`soft_<name>` [B, T, …] are the fields of `SoftLabels` themselves."""

    def labels(self, soft, chosen_N):
        if not soft and self.config.alpha == 0:
            return None
        names = [name for name in SoftLabels._fields if self.config.uses_samples or not name.startswith("sample")]
        labels = SoftLabels(**{name: soft[f"soft_{name}"].flatten(0, 1)[chosen_N] for name in names})
        return labels.first(self.config.k) if self.config.k else labels
