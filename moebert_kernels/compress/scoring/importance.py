"""Importance: what each neuron of a model's feed-forward networks is worth to its task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moebert_kernels.checks import check_tensor
from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.batching import LABEL_COLUMNS
from moebert_kernels.compress.scoring.losses import label_loss
from moebert_kernels.compress.scoring.token_scores import TokenScores, TokenScoreSums
from moebert_kernels.compress.storage.artifacts import replace_whole
from moebert_kernels.errors import UserError
from moebert_kernels.models.surgery import DenseFFN, find_ffns

LossFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]

_FORMAT = "moebert-importance 1"
_WITH_TOKENS = {"scores_LF", "token_scores_LGF", "token_group_V"}


@dataclass(frozen=True, eq=False)
class Importance:
    """The score of every neuron, and where it comes from.

    Attributes:
        scores_LF: [layers, dense width] finite and not negative; float32 on the CPU.
        model: name or folder of the model that was scored.
        task: the task it was scored on.
        num_samples: how many samples the scores sum over; 0 if unknown.
        tokens: scores of the same neurons for each group of token ids; None if they were not taken.
        weights: `weights_fingerprint` of the model that was scored; "" if unknown.

    Raises:
        UserError: the scores are not of this kind.
    """

    scores_LF: Tensor
    model: str
    task: str
    num_samples: int
    tokens: TokenScores | None = None
    weights: str = ""

    def __post_init__(self):
        scores_LF = self.scores_LF
        check_tensor("scores_LF", scores_LF)
        if scores_LF.dim() != 2 or 0 in scores_LF.shape or not scores_LF.is_floating_point():
            raise UserError(
                "importance scores must be floating-point numbers of shape [layers, neurons], got"
                f" {tuple(scores_LF.shape)} {scores_LF.dtype}"
            )
        scores_LF = scores_LF.detach().to("cpu", torch.float32).contiguous()
        if not bool((scores_LF.isfinite() & (scores_LF >= 0)).all()):
            raise UserError("importance scores must be finite and not negative, and some are not")
        if self.num_samples < 0:
            raise UserError(f"num_samples must not be negative, got {self.num_samples}")
        if self.tokens is not None:
            num_layers, _, width = self.tokens.scores_LGF.shape
            if (num_layers, width) != scores_LF.shape:
                raise UserError(
                    f"token scores are for {num_layers} layers of {width} neurons, importance scores for"
                    f" {scores_LF.shape[0]} of {scores_LF.shape[1]}"
                )
        object.__setattr__(self, "scores_LF", scores_LF)

    def share_curve_LQ(self, points: int = 101) -> list[list[float]]:
        """How much of a layer's importance its most important neurons hold.

        Returns:
            [L][points]: at index q the share held by the fraction q / (points - 1) of the neurons, 0 to 1.
        """
        sorted_LF = self.scores_LF.double().sort(dim=1, descending=True).values
        share_LF = sorted_LF.cumsum(1) / sorted_LF.sum(1, keepdim=True).clamp(min=1e-300)
        share_LF1 = torch.nn.functional.pad(share_LF, (1, 0))
        index_Q = torch.linspace(0, sorted_LF.shape[1], points).round().long()
        return share_LF1[:, index_Q].tolist()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; model, task and sample count are in its header.

        Raises:
            OutputError: the disk is full, or something else keeps it from being written.
        """
        header = {
            "format": _FORMAT,
            "model": self.model,
            "task": self.task,
            "num_samples": str(self.num_samples),
            "weights": self.weights,
        }
        tensors = {"scores_LF": self.scores_LF}
        if self.tokens is not None:
            tensors |= {
                "token_scores_LGF": self.tokens.scores_LGF,
                "token_group_V": self.tokens.group_V,
            }
        with replace_whole(Path(path)) as fresh:
            save_file(tensors, fresh, header)

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read a file that `save` wrote.

        Raises:
            UserError: it is missing, damaged, or some other file.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no importance file {path}")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                names = set(file.keys())
                if header.get("format") != _FORMAT or names not in ({"scores_LF"}, _WITH_TOKENS):
                    raise UserError(f"{path} is a safetensors file, but not of importance scores ({_FORMAT})")
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or not an importance file ({error}); files published with the authors'"
                " code are converted by `moebert importance --convert` (convert_published)"
            ) from None
        missing = [name for name in ("model", "task", "num_samples") if name not in header]
        if missing:
            raise UserError(f"{path} does not say in its header: {', '.join(missing)}; score the model again")
        try:
            tokens = None
            if names == _WITH_TOKENS:
                tokens = TokenScores(tensors["token_scores_LGF"], tensors["token_group_V"])
            return cls(
                tensors["scores_LF"],
                header["model"],
                header["task"],
                int(header["num_samples"]),
                tokens,
                header.get("weights", ""),
            )
        except ValueError as error:
            raise UserError(f"{path} does not hold importance scores as they are saved: {error}") from None

    def check(self, model: nn.Module) -> None:
        """Make sure the scores are of `model`; its name is not compared, folders move.

        Raises:
            UserError: the model's layers, their widths or their weights are others.
            ValueError: `find_ffns` found none.
        """
        num_layers, width = self.scores_LF.shape
        ffns = find_ffns(model)
        widths = [ffn.w1.out_features for ffn in ffns]
        scored = f"the importance scores of {self.model!r}"
        if widths != [width] * num_layers:
            found = f"{len(widths)} of {' or '.join(map(str, sorted(set(widths))))}"
            raise UserError(
                f"{scored} are for {num_layers} layers of {width} neurons, but the model has {found}:"
                " score this model"
            )
        if self.weights and self.weights != weights_fingerprint(ffns):
            raise UserError(
                f"{scored} were taken of a model of this shape with other weights: score this model"
            )


def weights_fingerprint(ffns: Iterable[DenseFFN]) -> str:
    """Return the sha256 of the weights that are scored, the same in float32 and in bfloat16."""
    digest = hashlib.sha256()
    for ffn in ffns:
        for weight in (ffn.w1.weight, ffn.w2.weight):
            rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()


def compute_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    loss: str | LossFunction = "labels",
    task: str = "",
    model_name: str | None = None,
    group_V: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Score every neuron by Eq. 4 of the paper, with one backward pass per batch.

    I_j sums over samples | <w1_j, dL/dw1_j> + <w2_j, dL/dw2_j> |. With h = x w1^T + b1 and a = act(h), the
    products of a sample are sums over its tokens of (h_tj - b1_j) dL/dh_tj and a_tj dL/da_tj, and a backward
    pass of the summed losses gives every sample its own gradients at h and a: none flow between samples.
    How samples are batched therefore changes nothing but rounding.

    Several processes (torchrun) share the batches out and return the same scores, collectively. Each is to be
    given all of the batches. What they find is added up in the order of the batches, as one process does it:
    where each computes a batch as that process would (the same kind of device and number of threads), scores
    are equal to the last bit. Token scores are summed up by each process first, and equal to rounding.

    The model is scored in evaluation mode and left as it was: modes, requires_grad and gradients. Under
    autocast its products are computed in that dtype, and what is summed up here in float32 or wider.

    Args:
        model: a fine-tuned encoder whose layers `find_ffns` knows, on any device.
        batches: training samples as the model takes them, on any device, with their labels.
        loss: "labels" for the model's own training loss, summed over samples (see `labelled_loss`), or a
            function of the model's output and the batch that gives a scalar sum over samples.
        task: recorded.
        model_name: recorded; None for the name the model was loaded by.
        group_V: the group of every token id, from `token_groups`, to take token scores in the same passes.
        progress: called after each batch with the number of samples so far.

    Raises:
        ValueError: there are no batches, a batch has no labels, labels do not fit the output, or `find_ffns`
            found nothing to score.
        UserError: the model's gradients are not finite.
    """
    ffns = find_ffns(model)
    device = ffns[0].w1.weight.device
    dtype = torch.promote_types(ffns[0].w1.weight.dtype, torch.float32)
    scores_LF = torch.zeros(len(ffns), ffns[0].w1.out_features, dtype=dtype, device=device)
    loss_function = _labelled_loss_of(model) if loss == "labels" else loss
    if not callable(loss_function):
        raise ValueError(f'loss must be "labels" or a function, got {loss!r}')
    tokens = None
    if group_V is not None:
        tokens = TokenScoreSums(group_V, *scores_LF.shape, dtype=dtype, device=device)
    num_samples = 0
    # The fused attention kernels for CUDA add up their gradients in no fixed order.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
    with _in_evaluation(model), torch.enable_grad(), attention:
        for turn in _turns(batches, distributed.world_size()):
            sums_LF = torch.zeros_like(scores_LF)
            if distributed.rank() < len(turn):
                batch = turn[distributed.rank()]
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                if tokens is not None:
                    tokens.begin_batch(batch)
                features = {name: value for name, value in batch.items() if name not in LABEL_COLUMNS}
                with _scoring(ffns, tokens) as products_LBF:
                    loss_function(model(**features), batch).backward()
                for sums_F, product_BF in zip(sums_LF, products_LBF, strict=True):
                    sums_F += product_BF.abs().sum(0)
            for found_LF in distributed.all_gather(sums_LF):
                scores_LF += found_LF
            num_samples += sum(len(next(iter(batch.values()))) for batch in turn)
            if progress is not None:
                progress(num_samples)
    if num_samples == 0:
        raise ValueError("batches is empty: importance needs training samples")
    if model_name is None:
        model_name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    token_scores = None
    if tokens is not None:
        tokens.add_up()
        token_scores = tokens.scores()
    return Importance(scores_LF, model_name, task, num_samples, token_scores, weights_fingerprint(ffns))


def _turns(batches: Iterable[Mapping[str, Tensor]], count: int) -> Iterator[list[Mapping[str, Tensor]]]:
    """Yield the batches that so many processes take at the same time, one each; the last may be too few."""
    batches = iter(batches)
    while turn := list(islice(batches, count)):
        yield turn


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _scoring(ffns: list[DenseFFN], tokens: TokenScoreSums | None) -> Iterator[list[Tensor]]:
    """Collect, in a backward pass inside, each layer's per-sample products [B, F]; B is known only then."""
    products_LBF: list[Any] = [0.0] * len(ffns)
    positions_seen = [0] * len(ffns)  # more than one call if the feed-forward network runs in chunks

    def product(activity_BSF: Tensor, bias_F: Tensor | None, gradient_BSF: Tensor) -> Tensor:
        wide = torch.promote_types(activity_BSF.dtype, torch.float32)
        activity_BSF = activity_BSF.to(wide)
        if bias_F is not None:
            activity_BSF = activity_BSF - bias_F.to(wide)
        return activity_BSF * gradient_BSF.to(wide)

    def collect_w1(layer: int, h_BSF: Tensor, bias_F: Tensor | None, gradient_BSF: Tensor) -> None:
        products_LBF[layer] += product(h_BSF, bias_F, gradient_BSF).sum(1)

    def collect_w2(layer: int, first: int, a_BSF: Tensor, gradient_BSF: Tensor) -> None:
        product_BSF = product(a_BSF, None, gradient_BSF)
        products_LBF[layer] += product_BSF.sum(1)
        if tokens is not None:
            tokens.add(layer, first, product_BSF)

    def after_w1(layer: int):
        def hook(w1: nn.Linear, args: tuple[Tensor, ...], h_BSF: Tensor) -> Tensor:
            if not h_BSF.requires_grad:
                # No parameter asks for a gradient, so the graph begins here, at the first scored layer.
                h_BSF = h_BSF.detach().requires_grad_()
            # The hooks hold detached values: holding the tensor they sit on would keep both alive for ever.
            values_BSF = h_BSF.detach()
            h_BSF.register_hook(lambda gradient: collect_w1(layer, values_BSF, w1.bias, gradient))
            return h_BSF

        return hook

    def before_w2(layer: int):
        def hook(w2: nn.Module, args: tuple[Tensor, ...]) -> None:
            values_BSF, first = args[0].detach(), positions_seen[layer]
            positions_seen[layer] += values_BSF.shape[1]
            args[0].register_hook(lambda gradient: collect_w2(layer, first, values_BSF, gradient))

        return hook

    handles = []
    for layer, ffn in enumerate(ffns):
        handles.append(ffn.w1.register_forward_hook(after_w1(layer)))
        handles.append(ffn.w2.register_forward_pre_hook(before_w2(layer)))
    try:
        yield products_LBF
    finally:
        for handle in handles:
            handle.remove()


def _labelled_loss_of(model: nn.Module) -> LossFunction:
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    return lambda output, batch: labelled_loss(output, batch, problem_type)


def labelled_loss(output: Any, batch: Mapping[str, Tensor], problem_type: str | None = None) -> Tensor:
    """Return the sum over samples of the training loss of transformers' heads.

    * "start_positions" and "end_positions": question answering, the mean of the two cross entropies over
      the real positions; answers beyond them count nothing. (transformers' own loss has the padding among
      the possible answers, so that a sample's loss would depend on its batch.)
    * "labels" of the logits' leading shape, integer: cross entropy, of a classified sequence or summed over
      a sample's tokens (token classification, masked language modelling); -100 counts nothing.
    * "labels" of one number per sample and `problem_type` "regression" or logits of width 1: squared error.
    * "labels" of the logits' shape: binary cross entropy, or under "regression" squared error, averaged
      over the outputs.

    Args:
        output: of the model, with `logits`, or `start_logits` and `end_logits`.
        batch: with the labels.
        problem_type: of the model's configuration.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: no labels, or of a shape that fits none of these.
    """
    if "start_positions" in batch and "end_positions" in batch:
        mask_BS = batch.get("attention_mask", torch.ones_like(output.start_logits))
        spans = (output.start_logits, output.end_logits), (batch["start_positions"], batch["end_positions"])
        return label_loss("question_answering", *spans, mask_BS, reduction="sum")
    if "labels" not in batch:
        raise ValueError(f"a batch has no labels, only {', '.join(batch)}")
    logits, labels = output.logits, batch["labels"]
    kind = None
    if logits.dim() == 2 and (logits.shape[1] == 1 or problem_type == "regression"):
        kind = "regression" if labels.numel() == logits.numel() else None
    elif labels.shape == logits.shape[:-1] and not labels.is_floating_point():
        kind = "classification"
    elif labels.shape == logits.shape and labels.is_floating_point():
        kind = "multi_label_classification"
    if kind is None:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype} do not fit logits of shape {tuple(logits.shape)}"
        )
    return label_loss(kind, logits, labels, reduction="sum")
