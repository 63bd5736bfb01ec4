"""Loss scaling for float16: gradients below its smallest number (6e-8) would be zero, so the loss is multiplied, and the gradient divided.

    scaled = scaler.scale(loss); scaled.backward()      gradient hooks see the multiplied gradient; surgery is linear, so it commutes
    scaler.unscale_(optimizer)                          norm, clipping and optimizer see the true one
    scaler.step(optimizer); scaler.update()             an overflow skips the update, on all ranks alike, and halves the factor

The factor is a power of two, so that away from the ends of the range no bit of a result depends on it. The rule is that of
torch.amp.GradScaler (same defaults, same names in the state), which torch 2.2 has for CUDA alone, and which decides each rank by
itself: with sharded gradients (FSDP) one rank would step where another does not.
"""

import math
from typing import Dict, Optional

import torch
import torch.distributed as dist

from vlakeep.core.parallel import Distributed

START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScaler:
    """Without `enabled` everything passes as it is. `factor`: the first one; `interval`: good steps after which it doubles."""

    def __init__(self, enabled: bool, factor: float = START, interval: int = INTERVAL):
        """ValueError unless the factor is a power of two."""
        if math.frexp(factor)[0] != 0.5:
            raise ValueError(f"loss scale {factor}: must be a power of two, or results depend on its rounding")
        self._enabled, self._factor, self._interval = enabled, factor, interval
        self._good = 0  # steps since the factor changed
        self._overflow: Optional[bool] = None  # of this step; None before unscale_
        self.skipped = 0  # updates of the whole run

    def is_enabled(self) -> bool:
        return self._enabled

    def get_scale(self) -> float:
        return self._factor if self._enabled else 1.0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._factor if self._enabled else loss

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, and see whether one of them, of any rank, is not finite. Waits for the device once."""
        if not self._enabled:
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        own = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        job = Distributed.current()
        bad = torch.zeros((), device=job.device if job else None)
        if own:
            torch._foreach_mul_(own, 1.0 / self._factor)
            # The largest magnitude: infinite or no number exactly where one of the numbers is.
            largest = torch._foreach_norm([grad for grad in own if grad.numel()], ord=math.inf)
            bad = (~torch.isfinite(torch.stack(largest))).any().float()
        if job is not None and job.world > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        self._overflow = bool(bad.item())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, unless a gradient overflowed."""
        if not self._enabled:
            optimizer.step()
            return
        assert self._overflow is not None, "unscale_ comes first"
        if not self._overflow:
            optimizer.step()

    def update(self) -> None:
        if not self._enabled:
            return
        if self._overflow:
            self._factor, self._good, self.skipped = self._factor * BACKOFF, 0, self.skipped + 1
        else:
            self._good += 1
            if self._good == self._interval:
                self._factor, self._good = self._factor * GROWTH, 0
        self._overflow = None

    def log(self) -> Dict[str, float]:
        """What the log says of it: the factor of the next step, and how many updates were skipped so far."""
        return {"loss_scale": self._factor, "skipped_steps": float(self.skipped)} if self._enabled else {}

    def state_dict(self) -> dict:
        return {"scale": self._factor, "_growth_tracker": self._good, "skipped": self.skipped} if self._enabled else {}

    def load_state_dict(self, state: dict) -> None:
        """Also that of a torch.amp.GradScaler. A run that went without scaling begins with the first factor."""
        if self._enabled and state:
            self._factor, self._good = float(state["scale"]), int(state["_growth_tracker"])
            self.skipped = int(state.get("skipped", 0))


if __name__ == "__main__":  # sanity check: python -m vlakeep.core.loss_scale
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), LossScaler(True, factor=8.0, interval=2)
    trail = []
    for grad in (1.0, math.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * grad).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        trail.append((weight[0].item(), scaler.get_scale()))
    print("weight and factor after each step, the second one overflowing:", trail)
    assert trail == [(0.5, 8.0), (0.5, 4.0), (0.0, 4.0), (-0.5, 8.0)] and scaler.skipped == 1
