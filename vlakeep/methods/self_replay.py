"""Method `self_replay`: the teacher's own answers to probe prompts are trained on beside the new task, as if they were data. After
Huang et al. 2024, Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized Rehearsal (arXiv 2403.01244).

    loss = loss of the new task + weight * cross entropy of the teacher's greedy answers to `items` probe items

It differs from method `distillation` by the hard label: what the teacher holds for second best is lost. Prompts and pictures are the
probe's; the paper has the model write the prompts too. Costs a forward and a backward pass of the adapted layers on `items` items.
"""

import torch

from vlakeep.methods import distillation
from vlakeep.teacher.answers import Answered, answer_columns


def hard(answered: Answered) -> Answered:
    """The same answers, each token certain: the divergence from it is the cross entropy."""
    steps = answered.top_NTK.shape[1]
    columns_NT = (answer_columns(answered.start_N, steps) + 1).clamp(max=answered.text_NL.shape[1] - 1)
    said_NT1 = answered.text_NL.gather(1, columns_NT)[..., None]
    nothing_NT = torch.full_like(answered.log_rest_NT, float("-inf"))
    return answered._replace(top_NTK=said_NT1, log_p_NTK=torch.zeros_like(said_NT1, dtype=torch.float32), log_rest_NT=nothing_NT)


class SelfReplay(distillation.Distillation):
    label, label_zh = "Self-distilled replay", "自蒸馏回放"

    def targets(self, answered):
        return hard(answered)


METHOD = SelfReplay
