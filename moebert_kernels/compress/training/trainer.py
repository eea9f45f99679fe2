"""The Trainer of distillation: labels, and every layer of a frozen teacher, at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from moebert_kernels.compress.data.batching import LABEL_COLUMNS, count_labels
from moebert_kernels.compress.data.predictions import Pooling, prediction_kind, prediction_of
from moebert_kernels.compress.scoring.losses import embedding_loss, label_loss, layer_loss, prediction_loss
from moebert_kernels.compress.training.load import TrainingLoad
from moebert_kernels.models import is_moe
from moebert_kernels.models.config import IGNORED_LABEL
from moebert_kernels.models.pack import Pack, pack_if_worthwhile
from moebert_kernels.models.packing import drops_weights, packed, why_not_packed
from moebert_kernels.routing.routers import RouterOutput


class _Units(NamedTuple):
    """How many things the loss terms are means over: labelled items, real tokens, sequences."""

    labels: Tensor
    tokens: Tensor
    sequences: Tensor


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` whose loss is CE + lambda (L_trm + L_pred) (section 3.3 and Eq. 5 to 7).

    CE is the loss from labels (mean squared error for regression), L_trm compares the L + 1 hidden states at
    real tokens, L_pred the predictions: of tokens, at those that have a label. A student with learned gates
    adds its load-balance loss, weighted by its configuration's `balance_loss_weight`. Everything else is the
    Trainer's: arguments, callbacks, mixed precision, checkpoints and resuming, gradient accumulation, whose
    step equals that of one large batch.

    The logs carry, beside `loss` (the total), the unweighted terms `ce`, `layer`, `prediction` and, with
    learned gates, `balance`, each averaged over the steps since the last log. Evaluation asks the student
    alone: `eval_loss` is the loss from labels, so that it compares with any other training of the same task.

    With `pooling`, the models are base models that embed sentences, and need no labels: `embedding_loss` of
    what they pool from their last hidden states takes the place of CE and L_pred; logged as `embedding`.

    Batches without labels have no CE: the teacher alone is learned from.

    Of a student with experts, `load` counts how many tokens each of them gets in every epoch.

    The teacher is not part of the student, nor of any checkpoint. It is frozen (its parameters no longer
    require gradients), put into eval mode and moved to the training device.

    Args:
        model: the student: sequence classification, by one label or several, or regression, token
            classification, masked LM or question answering.
        teacher: a model with the same head and as many layers of the same hidden size.
        args: as for `Trainer`.
        distill_weight: lambda, the weight of the distillation terms.
        layer_map: for each layer of a student that has another number of layers, the index, counted from 0,
            of the teacher's layer that it is compared with; None if they are compared one to one. The
            embedding outputs are compared in any case.
        pack: while training, compute real tokens alone in both models, if both can be packed, and compare
            their hidden states as rows; gradients are those of the padded form.
        pooling: makes a sentence's embedding of the last hidden states [B, S, D] and the mask [B, S]; None
            for models with a head.
        trainer_options: the other arguments of `Trainer`, such as `train_dataset`, `processing_class`,
            `compute_metrics` and `callbacks`.

    Raises:
        ValueError: the models do not fit each other, `distill_weight` is negative, or an option asks for a
            loss of its own (`compute_loss_func`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        args: TrainingArguments,
        distill_weight: float = 1.0,
        layer_map: Sequence[int] | None = None,
        pooling: Pooling | None = None,
        pack: bool = True,
        **trainer_options: Any,
    ):
        if distill_weight < 0:
            raise ValueError(f"distill_weight must not be negative, got {distill_weight}")
        if trainer_options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func does not apply: DistillationTrainer defines the loss")
        _check_models(model, teacher, layer_map)
        super().__init__(model, args, **trainer_options)
        self.learned_gates = is_moe(model.config) and model.config.is_gated
        if self.learned_gates and self.args.n_gpu > 1:
            raise ValueError(
                "learned gates do not train under DataParallel, which splits one batch over "
                f"{self.args.n_gpu} GPUs: start one process per GPU with torchrun, or show only one GPU"
            )
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.distill_weight = distill_weight
        self.layer_map = layer_map
        self.pooling = pooling
        self.pack = pack
        self._packs = False
        if is_moe(model.config) and self.args.n_gpu <= 1:  # DataParallel's replicas hand nothing out
            self.add_callback(TrainingLoad())
        # Says that compute_loss divides by what get_batch_samples counted, so that training_step does not.
        self.model_accepts_loss_kwargs = True
        self._reset_terms()

    @property
    def load(self) -> TrainingLoad | None:
        """What the experts get in training; None for a student without experts, and under DataParallel."""
        # Looked up, since a Trainer may put another in its place when it resumes.
        return next((c for c in self.callback_handler.callbacks if isinstance(c, TrainingLoad)), None)

    def train(self, *args, **kwargs):
        """Train as `Trainer.train` does, resuming included."""
        self._reset_terms()
        models = (self.accelerator.unwrap_model(self.model), self.teacher)
        # DataParallel's replicas get parts of a batch.
        if not self.pack or self.args.n_gpu > 1 or any(why_not_packed(model) for model in models):
            return super().train(*args, **kwargs)
        with packed(models[0]), packed(models[1]):
            self._packs = True
            try:
                return super().train(*args, **kwargs)
            finally:
                self._packs = False

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Draw the batches of one optimizer step and count what its loss terms are means over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([torch.stack(_count_units(batch)) for batch in batches]).sum(0).to(device)
        if self._shares_counts():
            counts = self.accelerator.reduce(counts, "sum")
        return batches, _Units(*counts.unbind())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: _Units | Tensor | int | None = None,
    ):
        """The loss of one (micro-)batch; in eval mode the loss from labels alone.

        Args:
            model: the student, wrapped or not.
            inputs: of the student, with labels.
            return_outputs: also return the student's outputs.
            num_items_in_batch: what `get_batch_samples` counted: terms are then divided by the counts of the
                whole step. Otherwise they are means over this batch.
        """
        labels = {name: inputs[name] for name in LABEL_COLUMNS if inputs.get(name) is not None}
        features = {name: value for name, value in inputs.items() if name not in LABEL_COLUMNS}
        if not model.training and self.pooling is None:
            if not labels:
                raise ValueError(f"evaluation needs labels; the batch holds only {', '.join(inputs)}")
            outputs = model(**features)
            loss = self._label_loss(outputs, labels, features.get("attention_mask"))
            return (loss, outputs) if return_outputs else loss

        routers: list[RouterOutput] = []
        load = self.load
        mask_BS = features.get("attention_mask")
        how: dict[str, Any] = {}  # both models are called
        extra: dict[str, Any] = {} if load is None else {"router_outputs": routers}
        if self._packs:
            how["pack"], is_full = self._pack(mask_BS, labels.get("labels"))
            features = {**features, "attention_mask": None} if is_full else features
        elif is_moe(self._student_config):
            extra["pack"] = False  # as the teacher, which has no such argument
        outputs = model(**features, **how, **extra, output_hidden_states=True)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_outputs = self.teacher(**features, **how, output_hidden_states=True)
        teacher_states = teacher_outputs.hidden_states
        if self.layer_map is not None:
            teacher_states = [teacher_states[0], *(teacher_states[1 + layer] for layer in self.layer_map)]
        layers = layer_loss(outputs.hidden_states, teacher_states, None if how.get("pack") else mask_BS)
        per_token = False
        if self.pooling is None:
            kind = self._kind(outputs)
            per_token = kind == "token_classification"
            # Of tokens without a label nobody asks for a prediction, and the teacher has learned none.
            predicted_BS = labels["labels"] != IGNORED_LABEL if per_token and labels else mask_BS
            predictions = prediction_of(outputs), prediction_of(teacher_outputs)
            terms = {"ce": self._label_loss(outputs, labels, mask_BS)} if labels else {}
            terms |= {"layer": layers, "prediction": prediction_loss(kind, *predictions, predicted_BS)}
        else:
            ours, theirs = (self.pooling(o.last_hidden_state, mask_BS) for o in (outputs, teacher_outputs))
            terms = {"layer": layers, "embedding": embedding_loss(ours, theirs)}
        weights = {name: 1.0 if name == "ce" else self.distill_weight for name in terms}
        if self.learned_gates:
            balances = [router.balance_loss for router in routers if router.balance_loss is not None]
            terms["balance"] = torch.stack(balances).mean()
            weights["balance"] = self._student_config.balance_loss_weight

        if isinstance(num_items_in_batch, _Units):
            here = _count_units(inputs)
            share = _Units(
                *(n / total.clamp(min=1) for n, total in zip(here, num_items_in_batch, strict=True))
            )
            shares = {
                "ce": share.labels,
                "layer": share.tokens,
                "prediction": (share.labels if labels else share.tokens) if per_token else share.sequences,
                "embedding": share.sequences,
                "balance": share.tokens,
            }
            terms = {name: term * shares[name] for name, term in terms.items()}
            if self._shares_counts():  # the gradients of the processes are averaged, their shares must add up
                terms = {name: term * self.args.world_size for name, term in terms.items()}
        self._add_terms(terms)
        if load is not None and model.training:
            self._add_load(load, routers)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the loss terms beside the Trainer's own `loss`."""
        if "loss" in logs and self._num_steps:
            for name, total in self._term_totals.items():
                if self.args.world_size > 1:
                    total = self.accelerator.reduce(total, "mean")
                logs[name] = total.item() / self._num_steps
            self._reset_terms()
        super().log(logs, start_time)

    @property
    def _student_config(self):
        return self.accelerator.unwrap_model(self.model).config

    def _pack(self, mask_BS: Tensor | None, labels: Tensor | None) -> tuple[Pack | Literal[False], bool]:
        """What both models compute, whose hidden states are rows then, and whether that is everything."""
        if mask_BS is None:
            return False, True
        of_tokens = labels is not None and labels.shape == mask_BS.shape and not labels.is_floating_point()
        read_BS = labels != IGNORED_LABEL if labels is not None and of_tokens else None
        dropout = drops_weights(self._student_config)
        pack, is_full = pack_if_worthwhile(mask_BS, read_BS, dropout=dropout)
        return False if pack is None else pack.with_rows_kept(), is_full

    def _kind(self, outputs: Any) -> str:
        return prediction_kind(outputs, self._student_config)

    def _label_loss(self, outputs: Any, labels: dict[str, Tensor], mask_BS: Tensor | None) -> Tensor:
        values = (
            labels["labels"] if "labels" in labels else (labels["start_positions"], labels["end_positions"])
        )
        smoothing = self.args.label_smoothing_factor
        return label_loss(
            self._kind(outputs), prediction_of(outputs), values, mask_BS, label_smoothing=smoothing
        )

    def _shares_counts(self) -> bool:
        return self.args.world_size > 1 and self.args.average_tokens_across_devices

    def _add_terms(self, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            previous = self._term_totals.get(name)
            self._term_totals[name] = term.detach() if previous is None else previous + term.detach()
        self._num_steps += self.accelerator.sync_gradients

    def _add_load(self, load: TrainingLoad, routers: list[RouterOutput]) -> None:
        counts_LE = torch.stack([router.plan.counts_E for router in routers]).long()
        if self._repeats_a_batch():
            counts_LE = torch.zeros_like(counts_LE)
        if self.args.world_size > 1:
            counts_LE = self.accelerator.reduce(counts_LE, "sum")
        load.add(int(self.state.epoch), counts_LE)

    def _repeats_a_batch(self) -> bool:
        """Whether the rows of this step are those that another process has counted."""
        return False

    def _reset_terms(self) -> None:
        # Tensors on the device until a log is due: reading one each step would wait for the device each step.
        self._term_totals: dict[str, Tensor] = {}
        self._num_steps = 0


def _count_units(batch: dict[str, Any]) -> _Units:
    ids = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"][..., 0]
    mask_BS = batch.get("attention_mask")
    sequences = torch.full((), ids.shape[0], device=ids.device)
    tokens = torch.full((), ids.numel(), device=ids.device) if mask_BS is None else mask_BS.ne(0).sum()
    return _Units(count_labels(batch), tokens, sequences)


def _check_models(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: Sequence[int] | None
) -> None:
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError("model and teacher share parameters; freezing the teacher would freeze the student")
    depth = teacher.config.num_hidden_layers
    if layer_map is not None and (
        len(layer_map) != student.config.num_hidden_layers or not set(layer_map) <= set(range(depth))
    ):
        raise ValueError(
            f"layer_map must name one of the teacher's layers, 0 to {depth - 1}, for each of the model's "
            f"{student.config.num_hidden_layers}, got {list(layer_map)}"
        )
    same = ("hidden_size", "num_labels") if layer_map else ("num_hidden_layers", "hidden_size", "num_labels")
    for name in same:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"model and teacher must have the same {name}, got {ours} and {theirs}")
    several = "multi_label_classification"
    ours, theirs = student.config.problem_type, teacher.config.problem_type
    if (ours == several) != (theirs == several):
        raise ValueError(f"model and teacher must have the same problem_type, got {ours!r} and {theirs!r}")
