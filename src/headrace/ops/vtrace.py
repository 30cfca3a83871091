"""V-trace: off-policy corrected value targets and advantages.

Source: Espeholt et al. 2018, "IMPALA" (arXiv:1802.01561), section 4.1; lambda is Remark 2. Where
lambda is less than 1 the advantage has two published forms, see `LambdaForm`.
Shape suffixes: T = unroll steps, U = T + 1 (the last row only bootstraps), B = unrolls.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headrace.ops.returns import discounted_sum

LambdaForm = Literal["traces", "advantage"]
"""What lambda weighs. traces: only those of the value targets, as in the paper's remark; the
advantage of step t then bootstraps from the target v of step t + 1. advantage: that bootstrap too,
lambda v + (1 - lambda) V, as `vtrace_td_error_and_advantage` of rlax has it. With lambda 1 they
are the same."""


class VTraceTargets(NamedTuple):
    """Constants of one unroll: no gradient flows through them."""

    value_TB: Tensor  # [T, B] what the value head should predict
    advantage_TB: Tensor  # [T, B] weight of the log-probability, already times the clipped ratio


@torch.no_grad()
def vtrace_targets(  # noqa: PLR0913 - V-trace has four clips and a decay
    log_ratio_TB: Tensor,
    reward_TB: Tensor,
    discount_TB: Tensor,
    value_UB: Tensor,
    *,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    pg_rho_max: float = 1.0,
    lambda_: float = 1.0,
    lambda_form: LambdaForm = "traces",
    pg_log_ratio_TB: Tensor | None = None,
) -> VTraceTargets:
    """Corrects value targets and advantages for the lag of the behaviour policy.

    Computes in float32, or in float64 where an input is float64.

    Args:
        log_ratio_TB: log-probability of the action, learner minus behaviour.
        reward_TB: transformed reward; where the step was truncated, plus gamma times the bootstrap.
        discount_TB: gamma, or 0 where the episode ended at this step, terminated or truncated.
        value_UB: estimates of the learner, in the unit of the reward.
        rho_max: clip of the ratio in the TD error; sets the fixed point.
        c_max: clip of the ratio in the trace; sets the speed, not the fixed point.
        pg_rho_max: clip of the ratio in the advantage.
        lambda_: decay of the trace, 1 for the longest.
        lambda_form: what that weighs.
        pg_log_ratio_TB: `log_ratio_TB` for the advantage alone, where a loss has the rest of the
            ratio itself; None for the same.
    """
    inputs = (log_ratio_TB, reward_TB, discount_TB, value_UB)
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
    log_ratio_TB, reward_TB, discount_TB, value_UB = (x.to(dtype) for x in inputs)

    ratio_TB = log_ratio_TB.exp()
    value_TB, next_value_TB = value_UB[:-1], value_UB[1:]
    delta_TB = ratio_TB.clamp(max=rho_max) * (reward_TB + discount_TB * next_value_TB - value_TB)
    decay_TB = discount_TB * ratio_TB.clamp(max=c_max) * lambda_

    target_UB = value_UB.clone()
    target_UB[:-1] += discounted_sum(delta_TB, decay_TB)

    # Advantage uses the corrected target of the next step, not its value: the paper's policy
    # gradient (section 4.2). An end has discount 0, so no target of the next episode gets in.
    next_target_TB = target_UB[1:]
    if lambda_form == "advantage":
        next_target_TB = lambda_ * next_target_TB + (1.0 - lambda_) * next_value_TB
    td_target_TB = reward_TB + discount_TB * next_target_TB
    if pg_log_ratio_TB is not None:
        ratio_TB = pg_log_ratio_TB.to(dtype).exp()
    advantage_TB = ratio_TB.clamp(max=pg_rho_max) * (td_target_TB - value_TB)
    return VTraceTargets(target_UB[:-1], advantage_TB)
