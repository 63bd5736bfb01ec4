"""What is trained of an assembled model, and the loss beside which its language stands.

    adapters of one rank    all linears of the decoder, and of the tower's blocks that are run
    in full                 the projector, and the rows of the vocabulary that no text uses (action tokens, padding)
    as they were            everything else: words, norms, positions, patches

So the change is small by its making (delta.py writes it), and the model with its adapters off is its own teacher: on texts, whose tokens
are words, it computes what the assembled one did.

Axes: B samples, T texts, P patches, L text tokens of a sample, C of them at most labelled, S = P + L, D hidden, K rows of the vocabulary,
W of them words.
"""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from vlakeep.core.errors import CheckpointError
from vlakeep.data.sample import IGNORE_INDEX, Batch
from vlakeep.models.adapters import ADAPTER, adapters_disabled, attach_lora
from vlakeep.models.outputs import LossOutput, loss_output
from vlakeep.models.prefix import Prefix
from vlakeep.openvla.delta import by_tensor, factors, own_parts, read_difference
from vlakeep.openvla.model import TiedHead
from vlakeep.openvla.tiny import ACTION_TOKENS, FIRST_ACTION_CHARACTER

PROJECTOR = "projector."


def words_of(processor) -> int:
    """W. CheckpointError for a vocabulary whose action tokens are words too, as Llama's are."""
    tokenizer = processor.tokenizer
    words = tokenizer.vocab_size - ACTION_TOKENS
    if tokenizer.convert_ids_to_tokens(words) != chr(FIRST_ACTION_CHARACTER):
        raise CheckpointError("the action tokens of this model stand on rows of words, which are not trained here: give --base a folder of "
                              "`vlakeep assemble-openvla`")
    return words


class NewRows(nn.Module):
    """The parametrisation of an embedding of which only the rows [K - W, D] behind the words are a parameter."""

    def __init__(self, words_WD: torch.Tensor):
        super().__init__()
        self.register_buffer("words_WD", words_WD.detach().clone())

    def forward(self, new_D: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.words_WD, new_D])

    def right_inverse(self, weight_KD: torch.Tensor) -> torch.Tensor:
        return weight_KD[len(self.words_WD):].detach().clone()


def seeing_linears(backbone) -> List[str]:
    """Names of the tower's linears that are run."""
    run = {id(module) for block in backbone.vision_blocks() for module in block.modules()}
    return [name for name, module in backbone.network.named_modules() if isinstance(module, nn.Linear) and id(module) in run]


def make_trainable(backbone, rank: int, seed: int) -> None:
    """Everything is frozen but the change; the model still computes what it did. CheckpointError for one that is not assembled."""
    if not isinstance(backbone.language_model.lm_head, TiedHead):
        raise CheckpointError(f"the head of {backbone.name} is not its embeddings, so that its action tokens are not trained here: give "
                              "--base a folder of `vlakeep assemble-openvla`")
    words, embeddings = words_of(backbone.processor), backbone.language_model.model.embed_tokens
    targets = backbone.linear_names(range(backbone.num_layers), list(backbone.groups)) + seeing_linears(backbone)
    attach_lora(backbone, targets, rank, float(rank), init="kaiming", seed=seed)
    parametrize.register_parametrization(embeddings, "weight", NewRows(embeddings.weight[:words]))
    embeddings.parametrizations.weight.original.requires_grad_(True)
    for name, parameter in backbone.network.named_parameters():
        if name.startswith(PROJECTOR):
            parameter.requires_grad_(True)


@torch.no_grad()
def begin_with(backbone, file: Path) -> Dict[str, Any]:
    """Give what is trained the values of a difference (delta.py), behind make_trainable; its facts. Directions that the difference does not
    have stay as they were drawn, at nothing. CheckpointError for a difference from other parts, or of a change that is not trained here."""
    facts, stored = read_difference(file)
    own_parts(backbone.checkpoint, file, facts, stored)
    words, network = words_of(backbone.processor), backbone.network
    for name, found in by_tensor(stored).items():
        place, _, leaf = name.rpartition(".")
        module = network.get_submodule(place)
        if hasattr(module, "lora_A") and leaf == "weight":
            if "whole" in found:  # a small matrix
                found = {"change": found["whole"].float() - module.base_layer.weight.cpu()}
            a_RI, b_OR = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            b_OK, a_KI = factors(found, len(a_RI))
            a_RI[:len(a_KI)], b_OR[:, :len(a_KI)] = a_KI, b_OK
        elif "whole" not in found:
            raise CheckpointError(f"{file} changes {name}, which has no adapter here")
        elif place.startswith(PROJECTOR.rstrip(".")):
            getattr(module, leaf).copy_(found["whole"])
        elif name in facts["rows"]:  # of the vocabulary
            first, last = facts["rows"][name]
            module.parametrizations.weight.original[first - words:last - words] = found["whole"].float()
    return facts


def make_whole(backbone) -> None:
    """The vocabulary is one parameter again, so that the model can be written."""
    parametrize.remove_parametrizations(backbone.language_model.model.embed_tokens, "weight", leave_parametrized=True)


class BesideTexts:
    """The loss of a batch and, beside it, how far the model has moved on texts: a KL from itself without its change, a token.

    Texts have as many tokens as a sample has positions, so that both go through the decoder as rows of one pass, of one shape. The teacher
    says nothing but words; the student's action tokens cost what it gives them.

    labels: C, where it is known. Logits are then made of the labelled columns of each row, and not from the first one of any row on: eight
    in place of thirty, whose logits would be a tenth of the step.
    """

    def __init__(self, backbone, weight: float, labels: Optional[int] = None):
        self._backbone, self._weight, self._labels, self._words = backbone, weight, labels, words_of(backbone.processor)
        self.kl = torch.zeros(())  # of the newest pass, nats a token

    def __call__(self, given: Tuple[Batch, Optional[torch.Tensor]]) -> LossOutput:
        """given: a batch, and texts as ids [T, S] or None."""
        batch, ids_TS = given
        with parametrize.cached():  # the vocabulary is put together once
            if ids_TS is None:
                prefix = self._backbone.embed(batch)
                return self._loss_of(batch, prefix, self._backbone.run_layers(prefix, stop=self._backbone.num_layers))
            return self._beside(batch, ids_TS)

    def _loss_of(self, batch: Batch, prefix: Prefix, last_BSD: torch.Tensor) -> LossOutput:
        if self._labels is None:
            return self._backbone.loss_of(batch, prefix, last_BSD)
        columns_BC, labels_BC = labelled_columns(batch.labels, self._labels)
        patches = last_BSD.shape[1] - batch.input_ids.shape[1]
        # A token is predicted one column before its own.
        hidden_BCD = last_BSD.gather(1, (patches + columns_BC - 1)[:, :, None].expand(-1, -1, last_BSD.shape[2]))
        return loss_output(self._backbone.logits(self._backbone.norm(hidden_BCD)), labels_BC, last_BSD, prefix.attention_mask_BS)

    def _beside(self, batch: Batch, ids_TS: torch.Tensor) -> LossOutput:
        backbone = self._backbone
        prefix = backbone.embed(batch)
        texts_TSD = backbone.network.embed(ids_TS, None).to(prefix.hidden_BSD.dtype)
        both = Prefix(torch.cat([prefix.hidden_BSD, texts_TSD]),
                      torch.cat([prefix.attention_mask_BS, torch.ones_like(ids_TS, dtype=torch.bool)]))
        last_BSD = backbone.run_layers(both, stop=backbone.num_layers)
        out = self._loss_of(batch, prefix, last_BSD[:batch.size])
        student_TSK = backbone.logits(backbone.norm(last_BSD[batch.size:]))
        with torch.no_grad(), adapters_disabled(backbone):
            before_TSD = backbone.run_layers(Prefix(texts_TSD.detach(), both.attention_mask_BS[batch.size:]))
            teacher_TSW = backbone.logits(before_TSD)[..., :self._words].log_softmax(-1)
        kl = kl_of_words(teacher_TSW, student_TSK)
        self.kl = kl.detach()
        return out._replace(loss=out.loss + self._weight * kl)


def labelled_columns(labels_BL: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(columns [B, C] of the first labelled token of each row and of the next ones, their labels), `count` of them, without asking the
    host. Columns behind the end stand for nothing: their label is IGNORE_INDEX."""
    columns_BC = (labels_BL != IGNORE_INDEX).int().argmax(1, keepdim=True) + torch.arange(count, device=labels_BL.device)
    inside_BC = columns_BC.clamp(1, labels_BL.shape[1] - 1)
    return inside_BC, labels_BL.gather(1, inside_BC).masked_fill(inside_BC != columns_BC, IGNORE_INDEX)


def kl_of_words(teacher_TSW: torch.Tensor, student_TSK: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student) in nats, from the teacher's log-probabilities of words and the student's logits of all
    rows."""
    student_TSW = student_TSK.log_softmax(-1)[..., :teacher_TSW.shape[-1]]
    return (teacher_TSW.exp() * (teacher_TSW - student_TSW)).sum(-1).mean()
