"""Mean pooling over instruction tokens (ICSM step 1): s_i = mean of h_t over the kept positions t.

Axes: B batch, T positions, D hidden size.
"""

from typing import Tuple

import torch


def masked_mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """(pooled [B, D] in the dtype of hidden, at least float32 inside; empty bool [B]).

    A row without a kept position is zero and flagged in `empty`. Values at dropped positions never enter, not even NaN or inf.
    Raises ValueError when the mask does not fit.
    """
    if mask_BT.dtype != torch.bool or mask_BT.shape != hidden_BTD.shape[:2]:
        raise ValueError(f"the mask must be bool {list(hidden_BTD.shape[:2])}, not {mask_BT.dtype} {list(mask_BT.shape)}")
    precise = torch.promote_types(hidden_BTD.dtype, torch.float32)
    kept_BTD = torch.where(mask_BT[:, :, None], hidden_BTD, torch.zeros((), dtype=hidden_BTD.dtype, device=hidden_BTD.device))
    count_B = mask_BT.sum(1)
    pooled_BD = kept_BTD.to(precise).sum(1) / count_B.clamp(min=1)[:, None]
    return pooled_BD.to(hidden_BTD.dtype), count_B == 0


if __name__ == "__main__":  # sanity check: python -m vlakeep.probe.pooling
    hidden_BTD = torch.tensor([[[1.0], [3.0], [float("nan")]], [[5.0], [5.0], [5.0]]])
    pooled_BD, empty_B = masked_mean(hidden_BTD, torch.tensor([[True, True, False], [False, False, False]]))
    print(f"mean of 1 and 3 beside a dropped NaN: {pooled_BD[0].item()}")
    print(f"a row without kept positions: {pooled_BD[1].item()}, flagged {empty_B.tolist()}")
    assert pooled_BD.tolist() == [[2.0], [0.0]] and empty_B.tolist() == [False, True]
