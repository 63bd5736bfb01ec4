"""Method `kfac`: the new task's loss plus the divergence of old answers to second order, by K-FAC. The penalty of TAK, Task Arithmetic with
KFAC regularisation, 2026 (arXiv 2602.17385, ICLR 2026); factors of Martens and Grosse 2015 (arXiv 1503.05671).

    penalty = strength * sum over linears 1/2 tr(F dW C dW^T)        dW = scale B A

C is the second moment of a linear's inputs on the probe, F that of the gradients at its output (teacher/fisher.py), so that with strength 1
the penalty is an estimate of KL(teacher || student) in nats per answer. TAK's F is that of the features' Jacobian, and its model is
linearised; here it is that of the log-probability of the teacher's own answers, and the model is as it is.

reads: artifact_dir/graded_<backbone>/ (C) and the probe; F is made at the start of training
"""

from dataclasses import dataclass

from vlakeep.methods import ewc
from vlakeep.methods.measured import answered_items
from vlakeep.methods.subspace import moment
from vlakeep.teacher.fisher import kfac_energy, output_fisher


@dataclass
class Options(ewc.Options):
    strength: float = 10.0


class KFAC(ewc.EWC):
    label, label_zh, Options = "K-FAC penalty (TAK)", "K-FAC 惩罚（TAK）", Options

    def _measure_importance(self, storage, backbone) -> None:
        parts, weights_N = answered_items(self._config, storage, backbone, self._options.items)
        linears, spectra = backbone.adapted_linears(), self._artifact.spectra()
        self._fisher = output_fisher(backbone, parts, backbone.first_adapted_layer(), linears, weights_N)
        shared = {key: moment(spectra[key], backbone.device) for key in sorted({backbone.input_key(name) for name in linears})}
        self._moments = {name: shared[backbone.input_key(name)] for name in linears}

    def cost(self, name, A_RD, B_OR, scale):
        return scale ** 2 * kfac_energy(A_RD, B_OR, self._moments[name], self._fisher[name])


METHOD = KFAC
