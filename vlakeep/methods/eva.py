"""Method `eva`: A from the principal components of the new task's inputs. Paischer et al. 2024, One Initialization to Rule them All:
Fine-tuning via Explained Variance Adaptation (arXiv 2410.07170), by PEFT's incremental PCA (peft 0.14 or newer).

It is about speed, not about old inputs: a control for methods that choose A by them. The ranks are not redistributed between linears
(rho = 1 in the paper's words), so that all arms have adapters of one shape.
"""

from vlakeep.methods import subspace


class EVA(subspace.Subspace):
    label, label_zh, Options, asks, peft_since = "EVA", "EVA", subspace.NewOptions, ("stream",), "0.14"


METHOD = EVA
