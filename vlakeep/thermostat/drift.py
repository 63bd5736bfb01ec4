"""Thermostat: how far the student has moved from the teacher.

covariance (the user's): d = || C_S - C_T ||_F of pooled instruction states, averaged over the representative layers. C_T comes
    from the whole probe, C_S from a fresh batch, so most of a small d is sampling noise; calibration measures that noise.
paired: the same items, teacher's pooled states stored. d = rms_i ||s_i^S - s_i^T|| / rms_i ||s_i^T - mu||, averaged over the
    representative layers; exactly zero at zero drift.

Axes: N items, D hidden size.
"""

from typing import Dict

import torch


def covariance(pooled_ND: torch.Tensor) -> torch.Tensor:
    """C [D, D], unbiased (N - 1), float64."""
    # float64, because d is the difference of two covariances that are nearly the same.
    x_ND = pooled_ND.double()
    if len(x_ND) < 2:
        raise ValueError(f"a covariance needs at least two pooled states, got {len(x_ND)}")
    centred_ND = x_ND - x_ND.mean(0)
    return centred_ND.T @ centred_ND / (len(x_ND) - 1)


def covariance_drift(student: Dict[int, torch.Tensor], teacher_covariance: Dict[int, torch.Tensor]) -> torch.Tensor:
    """Mean over layers of ||C_S - C_T||_F; `student[l]` [N, D], `teacher_covariance[l]` [D, D]. A scalar tensor, no sync."""
    return torch.stack([
        torch.linalg.matrix_norm(covariance(student[layer]) - teacher_covariance[layer].double()) for layer in student
    ]).mean()


def paired_drift(student: Dict[int, torch.Tensor], teacher: Dict[int, torch.Tensor], mean: Dict[int, torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the relative displacement of the same items; all [N, D], `mean[l]` [D]. A scalar tensor, no sync."""
    return torch.stack([
        (student[layer].double() - teacher[layer].double()).square().sum(1).mean().sqrt()
        / (teacher[layer].double() - mean[layer].double()).square().sum(1).mean().sqrt().clamp(min=1e-12)
        for layer in student
    ]).mean()


if __name__ == "__main__":  # sanity check: python -m vlakeep.thermostat.drift
    torch.manual_seed(0)
    teacher_ND = torch.randn(500, 32)
    stretched_ND = teacher_ND * torch.tensor([2.0] + [1.0] * 31)
    unchanged, some, stretched = (float(covariance_drift({0: student_ND}, {0: covariance(teacher_ND)}))
                                  for student_ND in (teacher_ND, teacher_ND[:64], stretched_ND))
    print(f"covariance drift, unchanged: {unchanged:.3f}, of 64 of 500 items: {some:.3f}, stretched: {stretched:.3f}")
    paired = float(paired_drift({0: stretched_ND}, {0: teacher_ND}, {0: teacher_ND.mean(0)}))
    print(f"paired drift, stretched: {paired:.3f}")
    # Doubling one of 32 directions of variance 1: (4 - 1) on the diagonal, 1 in a row and a column of noise; sqrt(1 / 32) when paired.
    assert unchanged == 0 and 0 < some < 10 and abs(stretched - 3) < 0.3 and abs(paired - 32 ** -0.5) < 0.02
